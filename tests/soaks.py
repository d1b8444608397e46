"""Made-up soaks for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from headway.benchmarks.soak_checks import Soak
from headway.benchmarks.soak_load import Outcome
from headway.benchmarks.soak_parity import Kept, Parity
from headway.benchmarks.soak_watch import COUNTED, HELD

SECONDS = 600.0
KINDS = (
    Outcome("one method", 0.0, 1.5, 200, 0.2, steered=True),
    Outcome("unsteered", 0.0, 0.5, 200),
    Outcome("bad request", 0.0, 0.01, 400, refused=True, reason="E_BAD_PARAM"),
    Outcome("client that leaves", 0.0, 0.3, None, steered=True, left=True),
)


def made_soak(**changed: Any) -> Soak:
    """A soak that keeps every limit; memory grows by 2 % after the warm-up."""
    outcomes = [each for each in KINDS for _ in range(100)]
    before = dict.fromkeys(HELD | COUNTED, 0.0) | {"output tokens": 100.0}
    after = dict.fromkeys(HELD | COUNTED, 0.0) | {"output tokens": 60_100.0}
    memory = [(float(at), 2000.0 + 40.0 * (at > SECONDS / 2)) for at in range(int(SECONDS))]
    parity = Parity([Kept.EQUAL] * 9 + [Kept.TIE], ["tie: "], 2e-6)
    facts = {"memory": memory, "memory_kind": "PSS", "parity": parity, **changed}
    return Soak(SECONDS, outcomes, before, after, **facts)


def spoiled(**changed: Any) -> Callable[[Soak], Soak]:
    """Adds one more outcome to a soak."""

    def change(found: Soak) -> Soak:
        first = Outcome("one method", 0.0, 1.0, 200, steered=True)
        return replace(found, outcomes=[*found.outcomes, replace(first, **changed)])

    return change


def after(name: str, value: float | None) -> Callable[[Soak], Soak]:
    """Changes what was read of a soak in the end."""
    return lambda found: replace(found, after=found.after | {name: value})
