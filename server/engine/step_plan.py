"""What steering does in one engine step: which rows of the batch belong to which slot.

The runner adapter makes a plan before the forward pass, the layers carry it out, and the adapter
closes it afterwards. `current` is the one place where they meet: it has one writer, the adapter.
How a plan is carried out depends on the device: `cpu_plan.py`, `gpu_plan.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from headway.server.engine.head_choice import Capture, Choice, Scale
from headway.server.engine.probe_readings import ProbeRow
from headway.server.engine.readings import RequestReadings
from headway.server.engine.sinks import SinkRows
from headway.server.engine.slots import SlotTables

if TYPE_CHECKING:
    from headway.server.engine.saliency_tape import SaliencyRow, SaliencyTape


@dataclass(frozen=True)
class Span:
    """Consecutive rows of the batch that belong to one request and one set of its edits.

    sequence: index of the request in the batch; num_scheduled: all its rows in this step.
    tag_row: row of its tags by position, -1 for none. prompt_len: in tokens.
    mass_row: row of the readings that its first row writes, -1 if its masses are not read.
    """

    request_id: str
    slot: int
    start: int
    stop: int
    sequence: int = 0
    num_scheduled: int = 0
    prompt_len: int = 0
    tag_row: int = -1
    mass_row: int = -1


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer of vLLM was called with, in the kernel's terms.

    max_query_len, max_seq_len: upper bounds known to the host. base_takes_seq_lens: whether the
    base kernel finds keys by the lengths it is given when it is called.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    output: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    softmax_scale: float
    soft_cap: float
    sliding_window: int
    max_query_len: int = 0
    max_seq_len: int = 0
    base_takes_seq_lens: bool = True


@dataclass
class Scheduled:
    """What the steered requests of a step add up to.

    num_reqs, num_tokens: of the whole batch. positions: of the first row of each span. readings:
    spans with a mass_row, in its order, each with the RequestReadings it adds to and the first of
    its rows that is an output position; mass_rows: how many rows that are. captures, choices: what
    the choice of heads takes from this step. saliency_rows: the rows whose candidates' saliencies
    are needed; rotary_positions: int64 [num_tokens] or [3, num_tokens], where there are such.
    probe_rows: those of which it is kept what the probes read; on CPU.
    """

    num_reqs: int = 0
    num_tokens: int = 0
    spans: list[Span] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sink_rows: list[SinkRows] = field(default_factory=list)
    readings: list[tuple[Span, RequestReadings, int]] = field(default_factory=list)
    mass_rows: int = 0
    captures: list[Capture] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    saliency_rows: list[SaliencyRow] = field(default_factory=list)
    rotary_positions: torch.Tensor | None = None
    probe_rows: list[ProbeRow] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do; choices come with spans."""
        return not (self.spans or self.sink_rows or self.captures or self.saliency_rows)


@dataclass
class StepPlan(ABC):
    """One step's plan and what came of it.

    spans: the rows to edit. sink_rows: prompt rows whose sinks must be tagged.
    failures: request id -> error, for requests whose edit raised in this step.
    affine_done, attention_done, sinks_done: layers at which that ran; residual_done: points.
    captures, choices, scale: the choice of heads, and how it is made.
    tape: what is kept for saliencies, which are computed after the step.
    seconds: time spent in steering code during this step.
    """

    tables: SlotTables
    spans: tuple[Span, ...]
    sink_rows: tuple[SinkRows, ...]
    seconds: float = field(default=0.0, kw_only=True)
    failures: dict[str, Exception] = field(default_factory=dict, kw_only=True)
    affine_done: set[int] = field(default_factory=set, kw_only=True)
    attention_done: set[int] = field(default_factory=set, kw_only=True)
    sinks_done: set[int] = field(default_factory=set, kw_only=True)
    residual_done: set[int] = field(default_factory=set, kw_only=True)
    captures: tuple[Capture, ...] = field(default=(), kw_only=True)
    choices: tuple[Choice, ...] = field(default=(), kw_only=True)
    scale: Scale | None = field(default=None, kw_only=True)
    tape: SaliencyTape | None = field(default=None, kw_only=True)

    @abstractmethod
    def attends(self, layer: int) -> bool:
        """Whether attention weights are edited, or sinks tagged, at a layer in this step."""

    @property
    @abstractmethod
    def watches_residual(self) -> bool:
        """Whether this step edits or observes the residual stream anywhere."""

    @abstractmethod
    def edits_at(self, point: int) -> bool:
        """Whether this step edits the residual stream at a point (see `num_points`)."""

    @abstractmethod
    def edit_residual(
        self, point: int, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        """Edit the residual stream at a point (see `num_points`); never raises for an edit.

        The stream is hidden_states + residual, both [num_tokens, hidden_size]; hidden_states is
        changed.
        """

    @abstractmethod
    def observe_residual(
        self, layer: int, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        """Find the sinks among the prompt rows of this step; never raises.

        The stream is that which enters the layer, after `edit_residual`.
        """

    @abstractmethod
    def edit_attention(
        self, layer: int, call: AttentionCall, base: Callable[[torch.Tensor | None], None]
    ) -> None:
        """Compute a layer's attention with the edits of this step; never raises for an edit.

        base: runs the base kernel on all rows, given the sequence lengths to pretend (None for the
        true ones).
        """

    @abstractmethod
    def edit_head_outputs(self, layer: int, output: torch.Tensor) -> None:
        """Apply the affine edits of a layer to its attention output, in place; never raises.

        output: [num_tokens, num_heads, head_size], or the same flattened to two dimensions.
        """

    def choose_heads(self, layer: int, heads: torch.Tensor) -> None:
        """Keep what the choice of heads needs of a layer, then choose; never raises.

        heads: [num_tokens, local heads, head_size], before any scaling.
        """
        for capture in self.captures:
            try:
                capture.read(layer, heads)
            except Exception as error:
                self.failures.setdefault(capture.request_id, error)
        for choice in self.choices:
            if layer not in choice.layers:
                continue
            try:
                assert self.scale is not None
                chosen = choice.choose(layer, heads, self.scale)
                for slot in choice.slots:
                    self.tables.multiply(layer, slot, chosen)
            except Exception as error:
                self.failures.setdefault(choice.request_id, error)

    @abstractmethod
    def collect(self) -> None:
        """Hand over what was read, after the forward pass."""

    @property
    def is_complete(self) -> bool:
        """Whether everything that the spans and sink rows ask for ran, or was attempted."""
        slots = [span.slot for span in self.spans]
        for flags, done in self._wanted():
            if _missing(np.logical_or.reduce(flags[slots]), done):
                return False
        return not any(self.missed(each) for each in self.sink_rows)

    def missed(self, item: Span | SinkRows) -> list[int]:
        """Layers, or points, at which something that a span, or sink rows, ask for did not run."""
        if isinstance(item, SinkRows):
            return _missing(item.layers, self.sinks_done)
        return [
            place for flags, done in self._wanted() for place in _missing(flags[item.slot], done)
        ]

    def _wanted(self) -> Iterator[tuple[np.ndarray, set[int]]]:
        """Which slots want something where, and where that ran."""
        yield self.tables.affine, self.affine_done
        yield self.tables.attends, self.attention_done
        yield self.tables.adds, self.residual_done


def _missing(wanted: np.ndarray, done: set[int]) -> list[int]:
    return [layer for layer in np.flatnonzero(wanted).tolist() if layer not in done]


class Planner(Protocol):
    """Makes the plans of a worker, and owns what outlives a step."""

    tables: SlotTables

    def plan(self, step: Scheduled) -> StepPlan:
        """The plan of a step that has something to do."""

    def changed(self) -> None:
        """A slot or a row of tags was taken or given back."""

    def reserve(self, readings: RequestReadings) -> None:
        """Make room for what a request reads. Raises RuntimeError if there is none."""

    def release(self, readings: RequestReadings) -> None:
        """A request that reads leaves the batch; it may come back."""


@dataclass
class Current:
    """Holds the plan of the step that is running; None outside of steered steps."""

    plan: StepPlan | None = None


current = Current()
