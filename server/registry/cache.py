"""Vector profiles kept in memory, so that requests do not read the disk again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from headway.server.registry.names import DIGEST_PREFIX
from headway.steering import Reason, SteeringError
from headway.steering.vectors import VectorProfile

DEFAULT_CACHE_BYTES = 512 * 1024 * 1024


class VectorCache:
    """The vector profiles used last, by digest (hex); at most `max_bytes` of tensors."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self._kept: OrderedDict[str, VectorProfile] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def load(self, digest: str, path: Path) -> VectorProfile:
        """The profile of this digest, read from `path` unless it is kept.

        Raises SteeringError: E_BAD_PARAM for a file that is none, E_STEERING_FAILED for a file
        that is not what the digest says.
        """
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest]
        profile = VectorProfile.load(path)
        if profile.digest != digest:
            message = f"the artefact {DIGEST_PREFIX}{digest} was changed on disk"
            raise SteeringError(Reason.STEERING_FAILED, message, "profile")
        self._keep(digest, profile)
        return profile

    def _keep(self, digest: str, profile: VectorProfile) -> None:
        size = size_of(profile)
        with self._lock:
            if digest in self._kept or size > self.max_bytes:
                return
            self._kept[digest] = profile
            self.size += size
            while self.size > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.size -= size_of(oldest)


def size_of(profile: VectorProfile) -> int:
    """Bytes of its tensors."""
    return sum(array.nbytes for array in profile.tensors.values())
