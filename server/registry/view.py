"""The profiles that requests may name: those given at the start of a server, and the registry's."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from headway.server.registry.cache import DEFAULT_CACHE_BYTES, VectorCache
from headway.server.registry.documents import Record, fits
from headway.server.registry.names import DIGEST_PREFIX, Reference, parse_digest, parse_reference
from headway.server.registry.store import Stamp, Store
from headway.steering import ModelGeometry, SteeringError
from headway.steering.profiles import AnyProfile, FoundProfile, NamedProfiles
from headway.steering.vectors import VectorProfile

MAX_RECORDS = 1024
"""Most versions of which the document and the header are kept in memory."""


def ignore(name: str, version: int) -> None:
    """What happens to versions of profiles where nobody wants to know."""


class RegistryProfiles:
    """The `Profiles` of a server.

    A name given at the start stands for that profile alone, also where the registry has it too.
    on_found: called with name and version whenever a version of the registry is found.
    Every call looks at the disk, so that what another server put or deleted is seen at once;
    documents, headers and tensors are read once.
    """

    def __init__(
        self,
        given: NamedProfiles,
        store: Store,
        geometry: ModelGeometry,
        max_bytes: int = DEFAULT_CACHE_BYTES,
        on_found: Callable[[str, int], None] = ignore,
    ) -> None:
        self.given = given
        self.vectors = VectorCache(max_bytes)
        self._store = store
        self._geometry = geometry
        self._on_found = on_found
        self._records: OrderedDict[str, tuple[Stamp, Record]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, reference: str) -> FoundProfile | None:
        """That of a name (the newest version), `name@version` or `sha256:digest`; else None.

        Raises SteeringError for one that cannot be read.
        """
        if reference in self.given.profiles:
            return self.given.find(reference)
        digest = parse_digest(reference)
        if digest is not None:
            profile = self._by_digest(digest)
            return None if profile is None else FoundProfile(reference, profile)
        try:
            record = self.record(reference)
        except SteeringError:
            if self._is_gone(self._digest(reference)):
                return None
            raise
        loaded = None if record is None else self.load(record)
        if record is None or loaded is None:
            return None
        self._on_found(record.name, record.number)
        return FoundProfile(record.reference, loaded)

    def names(self) -> tuple[str, ...]:
        """The names of profiles of this model, sorted."""
        stored = (name for name in self._store.names() if self._fits(name))
        return tuple(sorted({*self.given.names(), *stored}))

    def exact(self, reference: str) -> str | None:
        """What `find` would find, as it would name it, without reading tensors; else None."""
        if reference in self.given.profiles:
            return reference
        digest = parse_digest(reference)
        if digest is not None:
            exists = self._given_vectors(digest) or self._store.artifact(digest)
            return reference if exists else None
        version = self._version(reference)
        return None if version is None else str(version)

    def record(self, reference: str) -> Record | None:
        """A version of the registry by name (the newest) or `name@version`; None if there is none.

        Raises SteeringError for one that cannot be read.
        """
        version = self._version(reference)
        if version is None or version.version is None:
            return None
        stamp = self._store.stamp(version.name, version.version)
        if stamp is None:
            return None
        key = str(version)
        with self._lock:
            kept = self._records.get(key)
            if kept is not None and kept[0] == stamp:
                self._records.move_to_end(key)
                return kept[1]
        record = self._read(version.name, version.version)
        if record is not None:
            with self._lock:
                self._records[key] = stamp, record
                while len(self._records) > MAX_RECORDS:
                    self._records.popitem(last=False)
        return record

    def load(self, record: Record) -> AnyProfile | None:
        """The profile of a version, from the disk unless it is kept; None if it was deleted."""
        digest = record.document.digest
        return record.header if digest is None else self._by_digest(digest)

    def _version(self, reference: str) -> Reference | None:
        """The version that a reference means, as far as the names of files tell."""
        asked = parse_reference(reference)
        if asked is None or asked.name in self.given.profiles:
            return None
        versions = self._store.versions(asked.name)
        if not versions or (asked.version is not None and asked.version not in versions):
            return None
        return Reference(asked.name, asked.version or versions[-1])

    def _read(self, name: str, number: int) -> Record | None:
        document = self._store.document(name, number)
        if document is None:
            return None
        header = document.header(self._store.artifact, str(Reference(name, number)))
        return Record(name, number, document, header)

    def _fits(self, name: str) -> bool:
        try:
            record = self.record(name)
        except SteeringError:
            return False
        return record is not None and fits(record.header, self._geometry)

    def _by_digest(self, digest: str) -> VectorProfile | None:
        given = self._given_vectors(digest)
        if given is not None:
            return given
        path = self._store.artifact(digest)
        if path is None:
            return None
        try:
            return self.vectors.load(digest, path)
        except SteeringError:
            if self._is_gone(digest):
                return None  # deleted between the look and the load
            raise

    def _digest(self, reference: str) -> str | None:
        """The artefact that a version refers to, if it can be read that far."""
        version = self._version(reference)
        if version is None or version.version is None:
            return None
        return self._store.digest(version.name, version.version)

    def _is_gone(self, digest: str | None) -> bool:
        """Whether an artefact that a version refers to does not exist; None: it has none."""
        return digest is not None and self._store.artifact(digest) is None

    def _given_vectors(self, digest: str) -> VectorProfile | None:
        for profile in self.given.profiles.values():
            if isinstance(profile, VectorProfile) and profile.digest == digest:
                return profile
        return None


def digest_of(profile: AnyProfile) -> str | None:
    """The artefact that a profile is, as `sha256:...`; None for one that is JSON."""
    return f"{DIGEST_PREFIX}{profile.digest}" if isinstance(profile, VectorProfile) else None
