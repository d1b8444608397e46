"""The environments that peers run in, made once from the package registry by pip."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from headway.benchmarks.peer_systems.protocol import Peer
from headway.server.models import headway_home, is_complete, prepare_once

INSTALL_SECONDS = 1800
FREEZE = "requirements.txt"


class Unavailable(RuntimeError):
    """A peer cannot run here. command: what was tried."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(reason)
        self.command = command


@dataclass(frozen=True)
class Ran:
    """How a command ended: 0 or not, and what it wrote to stderr."""

    code: int
    errors: str


Runner = Callable[[Sequence[str]], Ran]


def run(command: Sequence[str]) -> Ran:
    """Run a command to its end, `INSTALL_SECONDS` at most."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return Ran(1, f"ERROR: no end after {INSTALL_SECONDS} s")
    return Ran(done.returncode, done.stderr)


def python_of(peer: Peer, runner: Runner = run) -> Path:
    """The interpreter to run a peer with: Headway's own, or that of the peer's environment.

    Whether the package exists for this Python is asked before anything is installed. Raises
    Unavailable.
    """
    if not peer.package:
        return Path(sys.executable)
    target = environment_of(peer)
    if not is_complete(target, lock_of(peer)):
        check_exists(peer, runner)
        if not peer.unavailable:
            prepare_once(target, lock_of(peer), lambda folder: install(peer, folder, runner))
    return target / "bin" / "python"


def check_exists(peer: Peer, runner: Runner = run) -> None:
    """Raise Unavailable unless the registry has the peer for this Python, and it can be driven."""
    with tempfile.TemporaryDirectory() as folder:
        download = ["pip", "download", "--quiet", "--no-deps", f"{peer.package}=={peer.version}"]
        _pip(Path(sys.executable), [*download[1:], "--dest", folder], download, runner)
    if peer.unavailable:
        raise Unavailable(peer.unavailable, shlex.join(download))


def install(peer: Peer, folder: Path, runner: Runner = run) -> None:
    """Fill a folder with a virtual environment of its own. Raises Unavailable."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # Compiling what is never imported would take longer than installing.
    command = ["pip", "install", "--quiet", "--no-compile", *requirements(peer)]
    _pip(python, command[1:], command, runner)
    found = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True)
    (folder / FREEZE).write_text(found.stdout)


def requirements(peer: Peer) -> list[str]:
    """What pip is asked for: the peer, what it needs, and the same torch that Headway runs on."""
    return [f"{peer.package}=={peer.version}", *peer.also, f"torch=={version('torch')}"]


def lock_of(peer: Peer) -> str:
    """What an environment depends on: the requirements and the version of Python."""
    return "\n".join([platform.python_version(), *requirements(peer)])


def environment_of(peer: Peer) -> Path:
    """Where the environment of a peer is, or will be."""
    digest = hashlib.sha256(lock_of(peer).encode()).hexdigest()[:12]
    return headway_home() / "peers" / f"{peer.package}-{digest}"


def version_of(peer: Peer) -> str:
    """The version that runs: of the peer's package, or of transformers in Headway's environment."""
    return peer.version or version("transformers")


def _pip(python: Path, arguments: Sequence[str], shown: Sequence[str], runner: Runner) -> None:
    ran = runner([str(python), "-m", "pip", *arguments])
    if ran.code != 0:
        raise Unavailable(_reason(ran.errors), shlex.join(shown))


def _reason(errors: str) -> str:
    # Of pip's output what it calls errors; the rest is about this machine's configuration.
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if "ERROR: " in line]
    return "; ".join(lines) or errors.strip()[-500:] or "pip failed without a word"
