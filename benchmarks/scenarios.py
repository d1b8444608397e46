"""What is measured: engines under a load, and the ratios between them that must hold.

A new measurement is a row of `SCENARIOS` and a row of `COMPARISONS`; a new way of steering is a
function in `STEERING`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headway.steering import ModelGeometry, SteeringProgram
from headway.steering.artifacts import ResidualArtifact
from headway.steering.head_words import HeadField, HeadWords, KeyClass, KeyTag
from headway.steering.program import HeadEdit, ResidualEdit, ResidualSite, SinkRule
from headway.steering.spans import parse_span


@dataclass(frozen=True)
class Scenario:
    """One load on one engine; scenarios with the same `engine` share a process.

    headway: whether Headway is on in the engine. steering: key of `STEERING` for the spec of each
    request, None for unsteered ones. num_requests: all at once, so also the batch size.
    prompt_tokens, output_tokens: per request, the output is never shorter; prompt_tokens None: as
    long as the run's options say. num_prompts: so many different prompts, in turn.
    configurations: so many different specs, in turn.
    cached: the prompts come from the prefix cache, all but their last token, so that what is timed
    is decoding at that context; otherwise every run computes its prompts.
    cpu_only: Headway refuses this on a CUDA device.
    """

    name: str
    headway: bool
    steering: str | None = None
    num_requests: int = 16
    prompt_tokens: int | None = None
    output_tokens: int = 32
    num_prompts: int = 16
    configurations: int = 16
    cached: bool = False
    cpu_only: bool = False
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


def locore(geometry: ModelGeometry, index: int) -> dict[str, Any]:
    """LocoRE with its defaults, another strength for every configuration."""
    return {"methods": [{"method": "locore", "beta": 0.15 + 0.01 * index}]}


def sgrs(geometry: ModelGeometry, index: int) -> dict[str, Any]:
    """SGRS with its defaults, whatever the configuration."""
    return {"methods": [{"method": "sgrs"}]}


SINK_DIMS = (0, 1)
TAU = 5.0
"""Which tokens are sinks in `redistribution`; any dimensions will do to time it."""


def redistribution(geometry: ModelGeometry, index: int) -> SteeringProgram:
    """VAR's edit for a model without images: on its default layers, 0.6 of the mass of the sinks
    goes to a marked part of the prompt instead of an image.
    """
    words = HeadWords.uniform(
        geometry,
        [
            (layer, h)
            for layer in range(2, geometry.num_layers - 1)
            for h in range(geometry.num_heads)
        ],
        {HeadField.MOVED_SHARE: 0.6 - 0.01 * index, HeadField.MIN_SHARE_B: 0.5},
        class_a=KeyClass(require=KeyTag.SINK),
        class_b=KeyClass(require=KeyTag.EMPHASISED, exclude=KeyTag.SINK),
    )
    return SteeringProgram(
        head_edits=(HeadEdit(words),),
        sink_rule=SinkRule(SINK_DIMS, TAU),
        marks=(parse_span({"tokens": [20, 340]}),),
    )


CLUSTERS = 4


def added(geometry: ModelGeometry, index: int, num_layers: int) -> SteeringProgram:
    """G-ACT's edit at so many layers, spread over the model, with drawn directions and probes.

    So weak that what is generated stays within what the model knows.
    """
    draw = np.random.default_rng(index)
    shape = CLUSTERS, geometry.hidden_size
    edits, artifacts = [], []
    for layer in np.linspace(0, geometry.num_layers - 1, num_layers).astype(int).tolist():
        directions, weights = draw.standard_normal((2, *shape)).astype(np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        artifacts.append(ResidualArtifact(directions, weights, np.zeros(CLUSTERS, np.float32)))
        site = ResidualSite.BLOCK_OUTPUT
        edits.append(ResidualEdit(layer, artifacts[-1].digest, 0.1, site=site))
    return SteeringProgram(residual_edits=tuple(edits), artifacts=tuple(artifacts))


def gact(geometry: ModelGeometry, index: int) -> SteeringProgram:
    """G-ACT's edit at four layers, another profile for every configuration."""
    return added(geometry, index, 4)


def gact_everywhere(geometry: ModelGeometry, index: int) -> SteeringProgram:
    """G-ACT's edit at all layers, another profile for every configuration."""
    return added(geometry, index, geometry.num_layers)


Steering = dict[str, Any] | SteeringProgram

STEERING: dict[str, Callable[[ModelGeometry, int], Steering]] = {
    "affine": affine,
    "locore": locore,
    "sgrs": sgrs,
    "gact": gact,
    "gact, all layers": gact_everywhere,
    "redistribution": redistribution,
}
"""Name -> the `steering` object, or the program, of configuration `index`, for a model."""

# A prompt for each request: in the cache VAR's edit shares none, and must not be compared with idle
# requests that do. The cache holds those of all loads: computing one again would take longer than
# what is timed.
SHORT: dict[str, Any] = {
    "headway": True,
    "prompt_tokens": 513,
    "output_tokens": 16,
    "cached": True,
}
LONG: dict[str, Any] = SHORT | {
    "prompt_tokens": 4097,
    "num_prompts": 1,
    "configurations": 1,
}
# On a CUDA device graphs would need the setting `residual_edits`, which idle engines do without.
ADDED: dict[str, Any] = {"headway": True, "cpu_only": True}
GATED: dict[str, Any] = SHORT | {"num_requests": 8, "cpu_only": True}

SCENARIOS = (
    Scenario("stock", headway=False),
    Scenario("idle", headway=True),
    Scenario("affine", headway=True, steering="affine"),
    Scenario("G-ACT, 4 layers", steering="gact", **ADDED),
    Scenario("G-ACT, all layers", steering="gact, all layers", **ADDED),
    Scenario("G-ACT, 1 profile", steering="gact, all layers", configurations=1, **ADDED),
    Scenario("idle, context 512", **SHORT),
    Scenario("LocoRE, context 512", steering="locore", **SHORT),
    Scenario("LocoRE, 4 configurations", steering="locore", **(SHORT | {"configurations": 4})),
    Scenario("LocoRE, 1 configuration", steering="locore", **(SHORT | {"configurations": 1})),
    Scenario("VAR's edit, context 512", steering="redistribution", **SHORT),
    Scenario("idle, 8 requests", **GATED),
    Scenario("SGRS, 8 requests", steering="sgrs", **GATED),
    Scenario("idle, context 4096", **LONG),
    Scenario("LocoRE, context 4096", steering="locore", **LONG),
    Scenario("VAR's edit, context 4096", steering="redistribution", **LONG),
)

COMPARISONS = (
    Comparison("Headway idle / stock vLLM", "idle", "stock", bar=0.99),
    Comparison("affine on every request / idle", "affine", "idle", bar=0.97),
    Comparison("G-ACT at 4 layers / idle", "G-ACT, 4 layers", "idle", bar=0.97),
    Comparison("G-ACT at all layers / idle", "G-ACT, all layers", "idle", bar=0.93),
    Comparison("G-ACT, 16 profiles / 1", "G-ACT, all layers", "G-ACT, 1 profile", bar=0.97),
    Comparison("LocoRE / idle, context 512", "LocoRE, context 512", "idle, context 512", bar=0.92),
    Comparison(
        "VAR's edit / idle, context 512", "VAR's edit, context 512", "idle, context 512", bar=0.92
    ),
    Comparison(
        "LocoRE / idle, context 4096", "LocoRE, context 4096", "idle, context 4096", bar=0.90
    ),
    Comparison(
        "VAR's edit / idle, context 4096",
        "VAR's edit, context 4096",
        "idle, context 4096",
        bar=0.90,
    ),
    Comparison("SGRS / idle, 8 requests", "SGRS, 8 requests", "idle, 8 requests", bar=0.40),
    Comparison("16 configurations / 1", "LocoRE, context 512", "LocoRE, 1 configuration", bar=0.97),
    Comparison(
        "4 configurations / 1", "LocoRE, 4 configurations", "LocoRE, 1 configuration", bar=0.97
    ),
)

QUICK = (
    "Headway idle / stock vLLM",
    "affine on every request / idle",
    "G-ACT at all layers / idle",
    "LocoRE / idle, context 512",
    "VAR's edit / idle, context 512",
)
"""The comparisons of a quick run: one of every kind of edit."""
QUICK_OUTPUT_TOKENS = 16
QUICK_PROMPTS = 4
"""So many different ones at most, since the first run of a load has to compute them all."""


def available(on_cuda: bool) -> tuple[tuple[Scenario, ...], tuple[Comparison, ...]]:
    """The scenarios that run on CPU, or on a CUDA device, and the comparisons between them."""
    scenarios = tuple(each for each in SCENARIOS if not (on_cuda and each.cpu_only))
    names = {each.name for each in scenarios}
    return scenarios, tuple(each for each in COMPARISONS if each.scenario in names)


def selected(
    scenarios: Sequence[Scenario], comparisons: Sequence[Comparison], text: str
) -> tuple[tuple[Scenario, ...], tuple[Comparison, ...]]:
    """The comparisons whose name contains a text, and the scenarios that they are between.

    Raises ValueError if there is none.
    """
    chosen = tuple(each for each in comparisons if text.lower() in each.name.lower())
    if not chosen:
        names = "; ".join(each.name for each in comparisons)
        raise ValueError(f'no comparison has "{text}" in its name; they are: {names}')
    return needed_by(chosen, scenarios), chosen


def needed_by(
    comparisons: Sequence[Comparison], scenarios: Sequence[Scenario]
) -> tuple[Scenario, ...]:
    """The scenarios that some comparisons are between."""
    needed = {name for each in comparisons for name in (each.scenario, each.baseline)}
    return tuple(each for each in scenarios if each.name in needed)


def sized(
    scenarios: Sequence[Scenario],
    dtype: str,
    prompt_tokens: int,
    enforce_eager: bool,
) -> tuple[Scenario, ...]:
    """The scenarios in a dtype, eager or with CUDA graphs, with prompts of this length where they
    say nothing of it.
    """
    return tuple(
        replace(
            scenario,
            dtype=dtype,
            enforce_eager=enforce_eager,
            prompt_tokens=scenario.prompt_tokens or prompt_tokens,
        )
        for scenario in scenarios
    )


def shortened(scenarios: Sequence[Scenario]) -> tuple[Scenario, ...]:
    """The scenarios as a quick run has them: fewer output tokens, fewer different requests."""
    return tuple(
        replace(
            scenario,
            output_tokens=min(scenario.output_tokens, QUICK_OUTPUT_TOKENS),
            num_prompts=min(scenario.num_prompts, QUICK_PROMPTS),
            configurations=min(scenario.configurations, QUICK_PROMPTS),
        )
        for scenario in scenarios
    )
