"""What the workers tell about a steered request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EngineReport:
    """Counts of one steered HTTP or offline request, over all its sequences (n > 1).

    positions_computed: token positions the model ran for the request (prompt and output, without
        those taken from the prefix cache, with those computed again after preemption).
    positions_edited: of these, how many lie in the scope of an edit and went through every edited
        layer with the edit applied; by_scope: the same by query scope.
    positions_missed: how many lie in the scope of an edit and did not.
    readings: what `RequestReadings.as_dict` tells, where the program reads masses.
    heads: [layer, head] of the heads that were chosen, where the program selects heads.
    saliency: of each sequence, where the program needs saliencies: `draws`, `refusals`, `fallbacks`
        and `tokens`, a list of [position, token id, saliency, threshold, draws, refusals,
        fallback], saliency and threshold None where there is none.
    probes: [point, cluster, row] of each probe that was read at the last prompt position of the
        first sequence: which cluster it picked for which x / rms(x), as float32 bytes.
    seconds: spent in steering in the steps that the request was part of, on one worker; the
        requests of a step share its time. No two runs have the same.
    """

    sequences: int = 0
    positions_computed: int = 0
    positions_edited: int = 0
    failed_stage: str | None = None
    failure: str | None = None
    positions_missed: int = 0
    by_scope: dict[str, int] = field(default_factory=dict)
    readings: dict[str, Any] | None = None
    heads: list[list[int]] = field(default_factory=list)
    saliency: list[dict[str, Any]] = field(default_factory=list)
    probes: list[list[Any]] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)

    def fail(self, stage: str, error: Exception) -> bool:
        """Note why the request failed; returns whether this is the first reason."""
        if self.failed_stage is not None:
            return False
        self.failed_stage = stage
        self.failure = f"{type(error).__name__}: {error}"
        return True

    @property
    def is_complete(self) -> bool:
        """Whether every computed position in the scope of an edit was edited as asked."""
        return (
            self.failed_stage is None
            and self.positions_computed > 0
            and self.positions_missed == 0
            and self.by_scope.get("all", self.positions_computed) == self.positions_computed
        )

    @property
    def coverage(self) -> str:
        """What is wrong with the counts of a report that is not complete, in words."""
        computed = f"{self.positions_computed} computed positions"
        if self.positions_missed:
            return f"{self.positions_missed} of {computed} lack an edit"
        edited = self.by_scope.get("all", self.positions_edited)
        return f"{edited} of {computed} were edited"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the RPC to the front end."""
        return asdict(self)

    def merge(self, other: EngineReport) -> EngineReport:
        """The sum over sequences of one request."""
        scopes = {*self.by_scope, *other.by_scope}
        return EngineReport(
            self.sequences + other.sequences,
            self.positions_computed + other.positions_computed,
            self.positions_edited + other.positions_edited,
            self.failed_stage or other.failed_stage,
            self.failure or other.failure,
            self.positions_missed + other.positions_missed,
            {scope: self.by_scope.get(scope, 0) + other.by_scope.get(scope, 0) for scope in scopes},
            merge_readings([self.readings, other.readings]),
            merge_heads([self.heads, other.heads]),
            self.saliency + other.saliency,
            merge_probes([self.probes, other.probes]),
            self.seconds + other.seconds,
        )


def merge_heads(parts: Iterable[list[list[int]]]) -> list[list[int]]:
    """Heads of several ranks, each with heads of its own, or of several sequences."""
    return [list(head) for head in sorted({tuple(head) for part in parts for head in part})]


def merge_probes(parts: Iterable[list[list[Any]]]) -> list[list[Any]]:
    """What several ranks, each with points of its own or with the same, or engines read.

    Of a point the first counts.
    """
    first: dict[int, list[Any]] = {}
    for part in parts:
        for read in part:
            first.setdefault(read[0], read)
    return [first[point] for point in sorted(first)]


def merge_readings(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Readings of several ranks, each with heads of its own, or of several engines."""
    known = [part for part in parts if part]
    if not known:
        return None
    return {
        "met": sum(part["met"] for part in known),
        "considered": sum(part["considered"] for part in known),
        "masses": [entry for part in known for entry in part["masses"]],
    }
