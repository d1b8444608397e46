"""What is measured: engines under a load, and the ratios between them that must hold.

A new measurement is a row of `SCENARIOS` and a row of `COMPARISONS`; a new way of steering is a
function in `STEERING`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headway.steering import ModelGeometry


@dataclass(frozen=True)
class Scenario:
    """One load on one engine; scenarios with the same `engine` share a process.

    headway: whether Headway is on in the engine. steering: key of `STEERING` for the spec of each
    request, None for unsteered ones. prompt_tokens, output_tokens: per request, the output is
    never shorter. num_requests: all at once, so also the batch size.
    """

    name: str
    headway: bool
    steering: str | None = None
    num_requests: int = 16
    prompt_tokens: int = 350
    output_tokens: int = 64
    dtype: str = "bfloat16"
    enforce_eager: bool = True

    @property
    def engine(self) -> tuple[bool, str, bool]:
        """What an engine is started with: Headway or not, dtype, eager or compiled."""
        return self.headway, self.dtype, self.enforce_eager


@dataclass(frozen=True)
class Comparison:
    """The throughput of a scenario relative to another; `bar` is the least it may be."""

    name: str
    scenario: str
    baseline: str
    bar: float


def affine(geometry: ModelGeometry, index: int) -> dict[str, Any]:
    """Another scale on two heads of every layer, different for every request."""
    draw = random.Random(index)
    scales = [
        [layer, head, round(draw.uniform(0.9, 1.1), 4)]
        for layer in range(geometry.num_layers)
        for head in sorted(draw.sample(range(geometry.num_heads), min(2, geometry.num_heads)))
    ]
    return {"methods": [{"method": "head_scale", "scales": scales}]}


STEERING: dict[str, Callable[[ModelGeometry, int], dict[str, Any]]] = {"affine": affine}
"""Name -> the `steering` object of request number `index`, for a model."""

SCENARIOS = (
    Scenario("stock", headway=False),
    Scenario("idle", headway=True),
    Scenario("affine", headway=True, steering="affine"),
)

COMPARISONS = (
    Comparison("Headway idle / stock vLLM", "idle", "stock", bar=0.99),
    Comparison("affine on every request / Headway idle", "affine", "idle", bar=0.97),
)
