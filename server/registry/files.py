"""Files that appear complete or not at all, and the lock around changes.

Temporary files stand in the folder of the file that they become, under names that begin with a
dot; no name of a profile, a preset or an artefact does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from headway.steering import Reason, SteeringError

TEMPORARY_PREFIX = ".temporary-"
LEFTOVER_SECONDS = 3600.0
"""From this age on, nobody is writing a temporary file any more."""


def write_new(path: Path, content: bytes) -> None:
    """Create a file. Raises FileExistsError, changing nothing, if there is one."""
    with _written(path, content) as temporary:
        os.link(temporary, path)


def write_over(path: Path, content: bytes) -> None:
    """Create or replace a file."""
    with _written(path, content) as temporary:
        os.replace(temporary, path)


def remove_leftovers(root: Path, now: float | None = None) -> int:
    """Remove what crashed writers left below a folder; returns how many files that was."""
    latest = (time.time() if now is None else now) - LEFTOVER_SECONDS
    removed = 0
    for path in root.glob(f"**/{TEMPORARY_PREFIX}*"):
        try:
            if path.stat().st_mtime < latest:
                path.unlink()
                removed += 1
        except FileNotFoundError:
            continue  # its writer finished after all, or another server was faster
    return removed


class Upload:
    """A file that is being received into a folder; in the end `discard` it, whatever happened.

    max_bytes: more raise SteeringError(E_TOO_LARGE) under `param`.
    """

    def __init__(self, folder: Path, max_bytes: int, param: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = _temporary(folder)
        self.size = 0
        self._max_bytes = max_bytes
        self._param = param
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = self.path.open("xb")

    def write(self, chunk: bytes) -> None:
        """Append."""
        self.size += len(chunk)
        check_size(self.size, self._max_bytes, self._param)
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> str:
        """Bring the file to the disk; returns the SHA-256 (hex) of its content."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def move_to(self, path: Path) -> None:
        """Let the finished file appear under its name, in the same folder."""
        os.replace(self.path, path)
        sync_folder(path.parent)

    def discard(self) -> None:
        """Remove what was not moved to a name of its own."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class FolderLock:
    """Held by one thread of one process at a time, which may take it again.

    path: of the lock file, whose folder is made when the lock is first taken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._of_thread = threading.RLock()
        self._depth = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        self._of_thread.acquire()
        try:
            if self._depth == 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w")
                fcntl.flock(self._file, fcntl.LOCK_EX)
            self._depth += 1
        except BaseException:
            self._of_thread.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            self._file.close()  # which ends the lock
            self._file = None
        self._of_thread.release()


def check_size(size: int, max_bytes: int, param: str) -> None:
    """Raise SteeringError(E_TOO_LARGE) for more than `max_bytes`."""
    if size > max_bytes:
        message = f"has more than the {max_bytes} bytes that are allowed"
        raise SteeringError(Reason.TOO_LARGE, message, param)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(folder: Path) -> Path:
    return folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file beside `path` with the content; afterwards it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
