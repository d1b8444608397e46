"""What the probes of vector profiles read in the last requests, until there is feedback on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headway.server.registry.names import parse_reference
from headway.steering import SteeringProgram
from headway.steering.refinement import ProbeReading

MAX_READ_REQUESTS = 1024
MAX_READ_BYTES = 64 * 1024 * 1024
"""Of how many requests it is kept what their probes read, and in how much memory."""


@dataclass(frozen=True)
class ProfileReading:
    """What the probes of one version of a profile read.

    reference: as the request was told: `name@version`, or what a profile is called that has none.
    """

    reference: str
    reading: ProbeReading

    @property
    def name(self) -> str | None:
        """The name in `name@version`; None for a profile without versions, which stays as it is."""
        found = parse_reference(self.reference)
        return None if found is None or found.version is None else found.name


@dataclass
class ReadRequest:
    """What was read of one request; given: the profiles that have had feedback on it."""

    readings: tuple[ProfileReading, ...]
    given: set[str] = field(default_factory=set)

    @property
    def num_bytes(self) -> int:
        """Memory of its rows."""
        return sum(each.reading.rows.nbytes for each in self.readings)


class ReadingStore:
    """What the probes read, by response id; the oldest go first."""

    def __init__(self, capacity: int = MAX_READ_REQUESTS, max_bytes: int = MAX_READ_BYTES) -> None:
        self._capacity, self._max_bytes = capacity, max_bytes
        self._kept: OrderedDict[str, ReadRequest] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, request_id: str, readings: Iterable[ProfileReading]) -> None:
        """Keep what was read of a request for profiles that have versions, if anything was."""
        kept = tuple(each for each in readings if each.name is not None)
        if not kept:
            return
        self._forget(request_id)
        self._kept[request_id] = read = ReadRequest(kept)
        self._size += read.num_bytes
        while len(self._kept) > self._capacity or self._size > self._max_bytes:
            self._forget(next(iter(self._kept)))

    def get(self, request_id: str) -> ReadRequest | None:
        """What was read of a request; None if nothing was, or it is not kept any more."""
        return self._kept.get(request_id)

    def _forget(self, request_id: str) -> None:
        read = self._kept.pop(request_id, None)
        self._size -= 0 if read is None else read.num_bytes


def profile_readings(
    program: SteeringProgram, probes: list[list[Any]]
) -> dict[int, ProfileReading]:
    """Index of a method of a program -> what its probes read, where something is known of that.

    probes: those of the `EngineReport`. Rows that are not finite have nothing to teach.
    """
    read = {point: (cluster, row) for point, cluster, row in probes}
    found = {}
    for index, applied in enumerate(program.applied):
        points = {} if applied.probes is None else applied.probes.points
        layers = tuple(layer for layer, point in points.items() if point in read)
        if applied.probes is None or not layers:
            continue
        clusters, rows = zip(*(read[points[layer]] for layer in layers), strict=True)
        table = np.stack([np.frombuffer(row, "<f4") for row in rows])
        if np.isfinite(table).all():
            reading = ProbeReading(layers, table, clusters)
            found[index] = ProfileReading(applied.probes.profile, reading)
    return found
