"""Which artefacts this front end has had the workers load, and which of them requests are using.

Artefacts are loaded once, when a request first needs them, and stay until the memory for them is
full; then those that were used least recently go, but none that a running request uses.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from typing import Any, Protocol

from headway.steering import Reason, SteeringError
from headway.steering.artifacts import ResidualArtifact, encode_artifact


class Loader(Protocol):
    """What reaches the workers: `SteeringClient`."""

    async def load_artifacts(self, wires: list[dict[str, Any]], holder: str) -> None:
        """Have all workers keep artefacts."""

    async def unload_artifacts(self, digests: list[str], holder: str) -> None:
        """Have all workers let go of artefacts."""


class HeldArtifacts:
    """The artefacts that one front end holds in the workers, at most `max_bytes` of them.

    resident: digests of those that every worker has had since its start.
    """

    def __init__(
        self, loader: Loader, max_bytes: int, resident: Collection[str] = frozenset()
    ) -> None:
        self._loader = loader
        self._max_bytes = max_bytes
        self._resident = frozenset(resident)
        self._holder = uuid.uuid4().hex
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()
        self._lock = asyncio.Lock()
        self._loading: set[asyncio.Task[None]] = set()

    @property
    def held_bytes(self) -> int:
        """Memory of what is held, on each worker."""
        return sum(self._sizes.values())

    async def acquire(self, artifacts: Sequence[ResidualArtifact]) -> list[str]:
        """Have artefacts loaded and keep them until `release` is called with what is returned.

        Raises SteeringError(E_CAPACITY) where running requests leave no memory for them, and
        whatever the workers raise; nothing is kept then.
        """
        needed = {each.digest: each for each in artifacts if each.digest not in self._resident}
        if not needed:
            return []
        self._users.update(needed.keys())
        try:
            if needed.keys() - self._sizes.keys() or self._lock.locked():
                await self._load_whatever_happens(needed)
        except BaseException:
            self.release(list(needed))
            raise
        for digest in needed:
            self._sizes.move_to_end(digest)
        return list(needed)

    def release(self, digests: Sequence[str]) -> None:
        """A request no longer uses them; they stay loaded while there is memory."""
        for digest in digests:
            self._users[digest] -= 1
            if self._users[digest] <= 0:
                del self._users[digest]

    async def _load_whatever_happens(self, needed: dict[str, ResidualArtifact]) -> None:
        """Load in a task of its own.

        The workers carry out what was sent to them, also for a client that has gone meanwhile.
        """
        task = asyncio.create_task(self._load(needed))
        self._loading.add(task)
        task.add_done_callback(self._has_loaded)
        await asyncio.shield(task)

    def _has_loaded(self, task: asyncio.Task[None]) -> None:
        self._loading.discard(task)
        if not task.cancelled():
            task.exception()  # else Python complains where nobody waits for it any more

    async def _load(self, needed: dict[str, ResidualArtifact]) -> None:
        async with self._lock:
            wanted = (each for digest, each in needed.items() if digest in self._users)
            missing = [each for each in wanted if each.digest not in self._sizes]
            sizes = {each.digest: each.num_bytes for each in missing}
            await self._make_room(sum(sizes.values()))
            if missing:
                wires = list(map(encode_artifact, missing))
                await self._loader.load_artifacts(wires, self._holder)
                self._sizes.update(sizes)

    async def _make_room(self, wanted: int) -> None:
        """Let go of unused artefacts, the least recently used first, until `wanted` bytes fit."""
        going: list[str] = []
        left = self.held_bytes + wanted
        for digest, size in self._sizes.items():
            if left <= self._max_bytes:
                break
            if digest not in self._users:
                going.append(digest)
                left -= size
        if left > self._max_bytes:
            message = (
                f"its vectors need {wanted} bytes of the workers' memory; running requests leave "
                f"{max(0, self._max_bytes - left + wanted)} of {self._max_bytes}"
            )
            raise SteeringError(Reason.CAPACITY, message)
        if going:
            for digest in going:
                del self._sizes[digest]
            await self._loader.unload_artifacts(going, self._holder)
