"""Which positions an edit applies to, and what a prompt's positions hold.

Everything is stated on absolute positions, so that neither chunks nor batches nor the prefix cache
can make a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headway.steering.program import QueryScope

Range = tuple[int, int]
"""Half-open: first position, position after the last."""

END = 1 << 62
"""Stop of a range without an end."""


@dataclass(frozen=True)
class PromptFacts:
    """What steering must know of a prompt as the engine gets it.

    image_spans: of each image, from its first embedding to its last, in ascending order;
    image_tokens: of these, the positions that hold image embeddings (some models put separators
    between them); marks: the emphasised positions. All as ascending ranges that do not overlap.
    """

    prompt_len: int
    image_spans: tuple[Range, ...] = ()
    image_tokens: tuple[Range, ...] = ()
    marks: tuple[Range, ...] = ()


@dataclass(frozen=True)
class Run:
    """Consecutive positions at which the same edits are active (as indices)."""

    start: int
    stop: int
    active: tuple[int, ...]


def scope_ranges(scope: QueryScope, facts: PromptFacts) -> tuple[Range, ...]:
    """The query positions of a scope."""
    if scope is QueryScope.ALL:
        return ((0, END),)
    if scope is QueryScope.OUTPUT:
        return ((facts.prompt_len, END),)
    if scope is QueryScope.FROM_LAST_PROMPT_TOKEN:
        return ((facts.prompt_len - 1, END),)
    ends = [stop for _, stop in facts.image_spans]
    starts = [start for start, _ in facts.image_spans[1:]] + [END] * bool(ends)
    gaps = zip(ends, starts, strict=True)
    return tuple((start, stop) for start, stop in gaps if start < stop)


def runs(scopes: Sequence[QueryScope], facts: PromptFacts, start: int, stop: int) -> list[Run]:
    """Cut [start, stop) where the set of active scopes changes."""
    ranges = {scope: scope_ranges(scope, facts) for scope in scopes}
    limits = [limits for each in ranges.values() for limits in each]
    edges = {edge for each in limits for edge in each if start < edge < stop}
    cuts = [start, *sorted(edges), stop]
    found = []
    for low, high in zip(cuts[:-1], cuts[1:], strict=True):
        covered = {scope for scope, each in ranges.items() if covers(each, low)}
        active = tuple(index for index, scope in enumerate(scopes) if scope in covered)
        found.append(Run(low, high, active))
    return found


def covers(ranges: Iterable[Range], position: int) -> bool:
    """Whether a position lies in one of the ranges."""
    return any(start <= position < stop for start, stop in ranges)
