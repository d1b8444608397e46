"""Models that Headway prepares by itself, for demos, tests and benchmarks without a model hub."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

COMPLETE_MARKER = ".headway-complete"


def headway_home() -> Path:
    """Where prepared models live: `$HEADWAY_HOME`, by default `~/.cache/headway`."""
    return Path(os.environ.get("HEADWAY_HOME") or Path.home() / ".cache" / "headway").expanduser()


def prepare_once(target: Path, version: str, build: Callable[[Path], None]) -> Path:
    """Return `target`, after `build(directory)` has filled it once for this `version`.

    The directory appears at `target` complete or not at all: `build` gets a temporary sibling,
    which is renamed into place once `build` has returned. Callers in other processes wait, then
    find it ready. A directory of another version, or one without its marker, is built anew. What
    `build` raises is passed on and nothing is left behind.
    """
    if is_complete(target, version):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(target, version):
            return target
        # A private parent and a child with ordinary permissions: 0700 would stick to the model.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            directory = Path(scratch) / target.name
            directory.mkdir()
            build(directory)
            (directory / COMPLETE_MARKER).write_text(version)
            if target.exists():
                shutil.rmtree(target)
            directory.rename(target)
    return target


def is_complete(target: Path, version: str) -> bool:
    """Whether `target` holds a finished model of this `version`."""
    marker = target / COMPLETE_MARKER
    return marker.is_file() and marker.read_text() == version
