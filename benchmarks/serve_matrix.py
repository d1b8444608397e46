"""What `headway bench serve` measures: cells along axes, and the ratios between them.

A new measurement is a row of `POINTS`; a new way of steering is an entry of `STEERING`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from headway.benchmarks.scenarios import CLUSTERS, affine, locore, sgrs
from headway.server.image_demo import STEERING as CHOSEN_HEADS
from headway.steering import ModelGeometry
from headway.steering.vectors import VectorHeader, VectorProfile

STOCK, HEADWAY = "stock", "headway"
TEXT, IMAGE = "text", "image"
UNSTEERED = "unsteered"
STREAMS = 16
"""Most requests at once."""
SGRS_STREAMS = 8
"""As many as `headway serve` lets use SGRS at a time by default; others would wait."""
IMAGE_CONTEXT = 52
"""Tokens of a question to the demo model before its last, 36 of them its picture."""
TOKENS_PER_SECOND = "tokens_per_second"
METRICS = (TOKENS_PER_SECOND, "ttft", "tpot", "e2e", "cold_e2e")
BARS = {UNSTEERED: 0.99, "affine": 0.97, "gact": 0.97, "locore": 0.92}
"""The least tokens/s of text, relative to the baseline, as `headway bench overhead` has it: with
16 requests at once, all steered, and a configuration for each."""


@dataclass(frozen=True)
class Cell:
    """One load on one server: so many requests at once.

    arm: `UNSTEERED` or a key of `STEERING`. share: which of them are steered. context: tokens of a
    prompt before its last. configurations: so many different specs, in turn; 0 for unsteered ones.
    """

    arm: str
    server: Literal["stock", "headway"]
    share: Literal["none", "one", "all"]
    batch: int
    context: int
    configurations: int
    modality: Literal["text", "image"]

    @property
    def load(self) -> str:
        """What is asked for, whoever answers."""
        return f"{self.batch} at once, {_context(self)}"

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return f"{_label(self)}, {self.load}{_variant(self)}"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each prompt. The last is computed even if all are in the prefix cache."""
        return self.context + 1

    @property
    def steered(self) -> int:
        """How many requests are steered; they come first."""
        return {"none": 0, "one": 1, "all": self.batch}[self.share]


@dataclass(frozen=True)
class Comparison:
    """A metric of a cell relative to the same load without steering, or without Headway.

    bar: the least that the ratio may be, None where it is only told.
    """

    cell: Cell
    reference: Cell
    baseline: Literal["stock", "idle"]
    metric: str
    bar: float | None

    @property
    def name(self) -> str:
        """Without the metric, which is a column of its own."""
        return f"{_label(self.cell)} / {self.baseline}, {self.cell.load}{_variant(self.cell)}"

    def facts(self) -> dict[str, Any]:
        """What the report says of it, beside the ratio."""
        fields = ("arm", "batch", "context", "configurations", "share", "modality")
        found = asdict(self.cell)
        return {
            "name": self.name,
            **{name: found[name] for name in fields},
            "baseline": self.baseline,
            "metric": self.metric,
        }


@dataclass(frozen=True)
class Point:
    """Some arms under one load, each also compared with an idle server, and that with stock vLLM.

    configurations: as many as are steered where None.
    """

    batch: int
    context: int
    arms: tuple[str, ...]
    configurations: int | None = None
    share: Literal["one", "all"] = "all"
    modality: Literal["text", "image"] = "text"

    def cells(self) -> tuple[Cell, ...]:
        """Stock vLLM, idle Headway, and each arm."""
        load = self.batch, self.context
        servers: tuple[Literal["stock", "headway"], ...] = ("stock", "headway")
        idle = tuple(Cell(UNSTEERED, server, "none", *load, 0, self.modality) for server in servers)
        steered = self.batch if self.share == "all" else 1
        return idle + tuple(
            Cell(
                arm,
                "headway",
                self.share,
                *load,
                1 if arm in ALIKE else self.configurations or steered,
                self.modality,
            )
            for arm in self.arms
        )

    def comparisons(self) -> list[Comparison]:
        """Idle Headway with stock vLLM, and each arm with idle Headway, by every metric."""
        stock, idle, *arms = self.cells()
        pairs: list[tuple[Cell, Cell, Literal["stock", "idle"]]] = [(idle, stock, "stock")]
        pairs += [(arm, idle, "idle") for arm in arms]
        return [
            Comparison(cell, reference, baseline, metric, _bar(cell, metric))
            for cell, reference, baseline in pairs
            for metric in METRICS
        ]


ALIKE = frozenset({"sgrs"})
"""Arms whose spec is the same whatever the configuration."""
CPU_ONLY = frozenset({"gact", "sgrs", "var"})
"""Arms that a CUDA device refuses, or whose graphs would need settings that are not made here."""
ADDING = ("affine", "locore", "gact")
POINTS = (
    Point(16, 512, (*ADDING, "vhr")),
    Point(1, 512, (*ADDING, "vhr", "sgrs")),
    Point(4, 512, (*ADDING, "vhr", "sgrs")),
    Point(16, 128, ADDING),
    # Four at once, or computing the prompts would take most of an hour.
    Point(4, 2048, ADDING),
    Point(4, 4096, ADDING),
    Point(16, 512, ADDING, configurations=1),
    Point(16, 512, ADDING, configurations=4),
    Point(16, 512, ADDING, share="one"),
    Point(4, 512, ("sgrs",), share="one"),
    Point(16, IMAGE_CONTEXT, ("vhr", "var"), modality="image"),
    Point(16, IMAGE_CONTEXT, ("vhr", "var"), configurations=1, modality="image"),
    Point(16, IMAGE_CONTEXT, ("vhr", "var"), share="one", modality="image"),
    Point(1, IMAGE_CONTEXT, ("vhr", "var"), modality="image"),
)
"""One thing at a time is changed from the first row; pictures have a first row of their own."""
QUICK_POINTS = (
    Point(16, 128, ()),
    Point(4, 128, ADDING),
    Point(4, 128, ("affine",), share="one"),
)


def comparisons(
    points: Iterable[Point], only: str | None = None, without: Container[str] = ()
) -> tuple[Comparison, ...]:
    """The comparisons of some points, each once, or those with a text in their name.

    without: arms to be left out. Raises ValueError if there is none.
    """
    every = dict.fromkeys(
        each for point in points for each in point.comparisons() if each.cell.arm not in without
    )
    chosen = tuple(each for each in every if not only or only.lower() in each.name.lower())
    if not chosen:
        names = "; ".join(dict.fromkeys(each.name for each in every))
        raise ValueError(f'no comparison has "{only}" in its name; they are: {names}')
    return chosen


def cells(compared: Sequence[Comparison]) -> tuple[Cell, ...]:
    """The cells that comparisons are between, each once."""
    return tuple(dict.fromkeys(cell for each in compared for cell in (each.reference, each.cell)))


def explicit_vhr(geometry: ModelGeometry, index: int) -> dict[str, Any]:
    """VHR for text: a head of every layer, named, another one for every configuration."""
    heads = [[layer, (layer + index) % geometry.num_heads] for layer in range(geometry.num_layers)]
    return {"methods": [{"method": "vhr", "alpha": 1.1 + 0.01 * index, "heads": heads}]}


def chosen_vhr(geometry: ModelGeometry, index: int) -> dict[str, Any]:
    """VHR as it is used on the demo model, which chooses heads by the prompt."""
    (method,) = CHOSEN_HEADS["methods"]
    return {"methods": [{**method, "alpha": 1.5 + 0.01 * index}]}


def var(geometry: ModelGeometry, index: int) -> dict[str, Any]:
    """VAR with the sink dimension of the demo model, another p for every configuration."""
    options = {"p": 0.6 - 0.01 * index, "sink_dims": [507], "tau": 20}
    return {"methods": [{"method": "var", **options}]}


def gact(geometry: ModelGeometry, index: int) -> dict[str, Any]:
    """G-ACT with one of the drawn profiles, a profile for every configuration."""
    return {"methods": [{"method": "gact", "profile": profile_name(index)}]}


STEERING: dict[tuple[str, str], Callable[[ModelGeometry, int], dict[str, Any]]] = {
    ("affine", TEXT): affine,
    ("locore", TEXT): locore,
    ("sgrs", TEXT): sgrs,
    ("gact", TEXT): gact,
    ("vhr", TEXT): explicit_vhr,
    ("vhr", IMAGE): chosen_vhr,
    ("var", IMAGE): var,
}
"""Arm and modality -> the `steering` object of configuration `index`, for a model."""


def profile_name(index: int) -> str:
    """What the server calls a drawn profile."""
    return f"drawn-{index}"


def drawn_profile(geometry: ModelGeometry, index: int, num_layers: int = 4) -> VectorProfile:
    """A G-ACT profile of so many layers, spread evenly, with drawn directions and probes.

    So weak that what is generated stays within what the model knows.
    """
    draw = np.random.default_rng(index)
    layers = sorted(set(np.linspace(0, geometry.num_layers - 1, num_layers).astype(int).tolist()))
    shape = len(layers), CLUSTERS, geometry.hidden_size
    directions, weights = draw.standard_normal((2, *shape)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    bias = np.zeros(shape[:2], np.float32)
    tensors = {"directions": directions, "probe_weights": weights, "probe_bias": bias}
    header = VectorHeader.of(geometry, kind="gact", layers=tuple(layers), strength=0.1)
    return VectorProfile(header, tensors)


def _bar(cell: Cell, metric: str) -> float | None:
    has_bar = metric == TOKENS_PER_SECOND and cell.modality == TEXT and cell.batch == STREAMS
    if not has_bar or cell.configurations not in (0, cell.batch):
        return None
    return BARS.get(cell.arm)


def _context(cell: Cell) -> str:
    return "pictures" if cell.modality == IMAGE else f"context {cell.context}"


def _label(cell: Cell) -> str:
    if cell.arm != UNSTEERED:
        return cell.arm
    return "stock" if cell.server == STOCK else "idle"


def _variant(cell: Cell) -> str:
    """How a cell differs from one where all requests are steered, each in a way of its own."""
    if cell.share == "one":
        return ", one steered"
    if cell.share == "none" or cell.configurations == cell.batch:
        return ""
    plural = "s" if cell.configurations > 1 else ""
    return f", {cell.configurations} configuration{plural}"
