"""The registry on disk: artefacts by content, numbered versions of profiles, presets.

    <root>/artifacts/<sha256>.safetensors
    <root>/profiles/<name>/<version>.json      a `ProfileDocument`; `counter` beside them
    <root>/presets/<name>.json

Several servers may share a root: changes are made under a lock, files appear complete, and
whoever looks sees what the others did.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headway.server.models import headway_home
from headway.server.registry.documents import ProfileContent, ProfileDocument
from headway.server.registry.files import (
    FolderLock,
    Upload,
    remove_leftovers,
    write_new,
    write_over,
)
from headway.server.registry.names import DIGEST_PREFIX, Reference, check_name, is_name, is_version
from headway.steering import ModelGeometry, Reason, SteeringError
from headway.steering.profiles import read_json
from headway.steering.vectors import MAX_VECTORS_BYTES, VectorProfile

Stamp = tuple[int, int, int]
"""Tells a file from every other that had its name."""

UNSEEN = (FileNotFoundError, NotADirectoryError, PermissionError)
"""A registry that is not there, or not for this user to see, is an empty one."""


class Store:
    """A registry on disk. Methods block on the disk, and on `lock` where they change something.

    lock: held by a caller around several steps that must see the same state.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = headway_home() / "registry" if root is None else root
        self.lock = FolderLock(self.root / ".lock")

    def remove_leftovers(self) -> int:
        """Remove what crashed servers left half-written; returns how many files that was."""
        return remove_leftovers(self.root)

    # Artefacts

    def upload(self) -> Upload:
        """A file to be filled, for `put_artifact`; in the end `discard` it."""
        return Upload(self.root / "artifacts", MAX_VECTORS_BYTES, "artifact")

    def put_artifact(self, digest: str, upload: Upload, geometry: ModelGeometry) -> bool:
        """Keep an upload under its SHA-256 (hex); returns whether it is new.

        Raises SteeringError: E_BAD_PARAM for another digest and for what is no vector profile,
        E_PROFILE_MISMATCH for one that was made for another model.
        """
        found = upload.finish()
        if found != digest:
            message = f"the content is {DIGEST_PREFIX}{found}, not {DIGEST_PREFIX}{digest}"
            raise SteeringError(Reason.BAD_PARAM, message, "artifact")
        VectorProfile.load(upload.path, "artifact").check_model(geometry, "artifact")
        target = self._artifact(digest)
        is_new = not target.exists()
        upload.move_to(target)
        return is_new

    def artifact(self, digest: str) -> Path | None:
        """The file of an artefact, None if there is none."""
        path = self._artifact(digest)
        return None if _stamp(path) is None else path

    # Profiles

    def names(self) -> tuple[str, ...]:
        """The profiles of which there is a version, sorted."""
        return tuple(name for name in _names(self.root / "profiles") if self.versions(name))

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of a profile, ascending."""
        stems = (file.removesuffix(".json") for file in _files(self._profile(name), ".json"))
        return tuple(sorted(int(stem) for stem in stems if is_version(stem)))

    def stamp(self, name: str, number: int) -> Stamp | None:
        """Tells a version from another that had its number; None if there is none."""
        return _stamp(self._version(name, number))

    def document(self, name: str, number: int) -> ProfileDocument | None:
        """A version of a profile; None if there is none. Raises SteeringError if it is damaged."""
        try:
            return ProfileDocument.model_validate_json(self._version(name, number).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            where = str(Reference(name, number))
            raise SteeringError(Reason.BAD_PARAM, f"is damaged: {error}", where) from None

    def put_profile(self, name: str, value: Any, geometry: ModelGeometry) -> tuple[int, bool]:
        """Make the next version of a profile; returns its number and whether it is new.

        The content of the newest version makes no new one. Raises SteeringError: E_BAD_PARAM,
        E_UNSUPPORTED, E_TOO_LARGE, and E_PROFILE_MISMATCH for a profile of another model.
        """
        check_name(name, "name")
        content = ProfileContent.parse(value, "profile")
        with self.lock:
            content.header(self.artifact, "profile").check_model(geometry, "profile")
            versions = self.versions(name)
            newest = self._readable(name, versions[-1]) if versions else None
            if newest is not None and newest.content == content:
                return versions[-1], False
            counter = self._profile(name) / "counter"
            number = max(_count(counter), *versions, 0) + 1
            # The counter first: after a crash between the two a number is skipped, never reused.
            write_over(counter, f"{number}\n".encode())
            write_new(self._version(name, number), ProfileDocument.of(content).encode())
            return number, True

    def delete_profile(self, name: str, numbers: tuple[int, ...]) -> tuple[str, ...]:
        """Remove versions; returns the digests (hex) of the artefacts that went with them.

        Those are the artefacts that no version of any profile refers to any more.
        """
        with self.lock:
            orphans = self.orphans(name, numbers)
            for number in numbers:
                self._version(name, number).unlink(missing_ok=True)
            for digest in orphans:
                self._artifact(digest).unlink(missing_ok=True)
            return orphans

    def orphans(self, name: str, numbers: tuple[int, ...]) -> tuple[str, ...]:
        """The artefacts that nothing would refer to without these versions, sorted."""
        going: set[str | None] = set()
        staying: set[str | None] = set()
        for each in self.names():
            for number in self.versions(each):
                digest = self.digest(each, number)
                (going if each == name and number in numbers else staying).add(digest)
        return tuple(sorted(digest for digest in going - staying if digest is not None))

    def digest(self, name: str, number: int) -> str | None:
        """Digest (hex) of the artefact of a version; None if it has none, or is damaged."""
        document = self._readable(name, number)
        return None if document is None else document.digest

    # Presets

    def preset_names(self) -> tuple[str, ...]:
        """The presets there are, sorted."""
        stems = (file.removesuffix(".json") for file in _files(self.root / "presets", ".json"))
        return tuple(sorted(filter(is_name, stems)))

    def preset_stamp(self, name: str) -> Stamp | None:
        """Tells the content of a preset from an earlier one; None if there is none."""
        return _stamp(self._preset(name)) if is_name(name) else None

    def preset(self, name: str) -> Any:
        """The JSON of a preset. Raises SteeringError(E_BAD_PARAM) if it cannot be read."""
        return read_json(self._preset(name), name)

    def put_preset(self, name: str, value: dict[str, Any]) -> None:
        """Create or replace a preset."""
        with self.lock:
            write_over(self._preset(name), json.dumps(value, indent=1).encode() + b"\n")

    def delete_preset(self, name: str) -> bool:
        """Remove a preset; returns whether there was one."""
        with self.lock:
            existed = self._preset(name).exists()
            self._preset(name).unlink(missing_ok=True)
            return existed

    def _readable(self, name: str, number: int) -> ProfileDocument | None:
        try:
            return self.document(name, number)
        except SteeringError:
            return None

    def _artifact(self, digest: str) -> Path:
        return self.root / "artifacts" / f"{digest}.safetensors"

    def _profile(self, name: str) -> Path:
        return self.root / "profiles" / check_name(name, "name")

    def _version(self, name: str, number: int) -> Path:
        return self._profile(name) / f"{number}.json"

    def _preset(self, name: str) -> Path:
        return self.root / "presets" / f"{check_name(name, 'name')}.json"


def _files(folder: Path, suffix: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.endswith(suffix)]
    except UNSEEN:
        return []


def _names(folder: Path) -> list[str]:
    return sorted(filter(is_name, _files(folder, "")))


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except UNSEEN:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _count(path: Path) -> int:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
