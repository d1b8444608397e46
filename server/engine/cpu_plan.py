"""Carries a step's plan out on CPU: numpy on the host, kernels called layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from headway.kernels.head_affine import Rows, head_affine_
from headway.server.engine.attention_layout import AttentionLayout
from headway.server.engine.head_choice import Gather, choose_heads
from headway.server.engine.probe_readings import ProbeRow
from headway.server.engine.readings import Readings, RequestReadings
from headway.server.engine.residual_layout import ResidualLayout
from headway.server.engine.saliency_tape import SaliencyTape
from headway.server.engine.sinks import SinkRows, SinkTags, sink_flags
from headway.server.engine.slots import SlotTables
from headway.server.engine.step_plan import AttentionCall, Scheduled, Span, StepPlan

GATHER_LIMIT = 1 << 22
"""Largest number of scales gathered for all layers at once; beyond it, layer by layer."""

Item = TypeVar("Item", Span, SinkRows, ProbeRow)


def identity(tensor: torch.Tensor) -> torch.Tensor:
    """What a group of one gathers."""
    return tensor


@dataclass
class RowLayout:
    """The rows of some spans, laid out for the kernels; kept while the batch stays the same.

    rows: the rows to scale and shift; slots: int64 [num_rows], the slot of each; layers: scaled or
    shifted by any; residual: the residual edits of all.
    """

    spans: tuple[Span, ...]
    rows: Rows
    slots: torch.Tensor
    layers: frozenset[int]
    shift_layers: frozenset[int]
    residual: ResidualLayout
    scale: torch.Tensor | None  # [num_layers, num_rows, heads] where it was gathered at once
    attention: AttentionLayout

    @classmethod
    def of(cls, spans: tuple[Span, ...], tables: SlotTables) -> RowLayout:
        """Lay out spans given in ascending order of rows."""
        counts = [span.stop - span.start for span in spans]
        used = [span.slot for span in spans]
        rows_of = [np.arange(span.start, span.stop) for span in spans]
        index = np.concatenate(rows_of) if rows_of else np.zeros(1, np.int64)
        slots = torch.from_numpy(np.repeat(np.array(used, dtype=np.int64), counts))
        contiguous = index[-1] - index[0] + 1 == len(index)
        rows = slice(int(index[0]), int(index[-1]) + 1) if contiguous else torch.from_numpy(index)
        layers = np.flatnonzero(tables.affine[used].any(axis=0))
        shift_layers = np.flatnonzero(tables.shifted[used].any(axis=0))
        num_layers, _, heads = tables.scale.shape
        gathered = None
        if len(layers) and num_layers * len(index) * heads <= GATHER_LIMIT:
            gathered = tables.scale.index_select(1, slots)
        return cls(
            spans,
            rows,
            slots,
            frozenset(layers.tolist()),
            frozenset(shift_layers.tolist()),
            ResidualLayout(spans, tables),
            gathered,
            AttentionLayout(spans, tables),
        )


@dataclass
class CpuStepPlan(StepPlan):
    """A step on CPU.

    positions: int32 [num_spans], the position of the first row of each span. sink_tags: where the
    tags live. probe_rows: those of which it is kept what the probes read.
    """

    layout: RowLayout
    positions: np.ndarray
    sink_tags: SinkTags
    readings: Readings | None = None
    probe_rows: tuple[ProbeRow, ...] = ()
    _flags: dict[int, torch.Tensor] = field(default_factory=dict)

    def attends(self, layer: int) -> bool:
        return layer in self.layout.attention.layers or any(
            rows.layers[layer] for rows in self.sink_rows
        )

    @property
    def watches_residual(self) -> bool:
        return bool(self.sink_rows or self.layout.residual.points)

    def edits_at(self, point: int) -> bool:
        return point in self.layout.residual.points

    def edit_residual(
        self, point: int, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        if not self.edits_at(point):
            return
        layout = self.layout.residual
        started = time.perf_counter()
        if self.probe_rows:
            stream, parts = (hidden_states, residual), self.tables.parts
            self._each(self.probe_rows, lambda each: each.read(point, parts[each.slot], *stream))
        try:
            layout.edit(point, hidden_states, residual)
        except Exception:
            # Nothing was written yet: once more, request by request, to find whose edit it is.
            self._each(
                [span for span in self.spans if self.tables.adds[span.slot, point]],
                lambda span: layout.alone(span).edit(point, hidden_states, residual),
            )
        self.residual_done.add(point)
        self.seconds += time.perf_counter() - started

    def observe_residual(
        self, layer: int, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        rows = [each for each in self.sink_rows if each.layers[layer]]
        if not rows:
            return
        started = time.perf_counter()
        flags = torch.zeros(len(hidden_states), dtype=torch.uint8)
        self._each(rows, lambda each: sink_flags(each, hidden_states, residual, flags))
        self._flags[layer] = flags
        self.seconds += time.perf_counter() - started

    def edit_attention(
        self, layer: int, call: AttentionCall, base: Callable[[torch.Tensor | None], None]
    ) -> None:
        # Where this plan edits all rows of a sequence the base kernel is told that it has no keys
        # but the new ones, and where it edits all rows of the step it is not run at all.
        layout, started = self.layout.attention, time.perf_counter()
        rows = [each for each in self.sink_rows if each.layers[layer]]
        if rows:
            flags = self._flags.pop(layer, None)
            self._each(rows, lambda each: self.sink_tags.write(each, layer, flags, call))
            self.sinks_done.add(layer)
        if layer not in layout.layers:
            self.seconds += time.perf_counter() - started
            base(None)
            return
        group = layout.group(layer)
        seq_lens = group.base_seq_lens(self, call.seq_lens)
        self.seconds += time.perf_counter() - started
        if seq_lens is not None:
            base(seq_lens)
        started = time.perf_counter()
        slot_tags = self.sink_tags.layer(layer)
        try:
            masses = self.readings.buffer(layer) if self.readings else None
            group.run(self, layer, call, slot_tags, masses)
            failed = False
        except Exception:
            failed = True
        self.seconds += time.perf_counter() - started
        if failed:
            # Every row gets its unedited attention, then one request after the other its edit, to
            # find whose fault it is.
            base(None)
            self._each(
                [span for span in self.layout.spans if self.tables.attends[span.slot, layer]],
                lambda span: layout.alone(span).run(self, layer, call, slot_tags, None),
            )
        self.attention_done.add(layer)

    def edit_head_outputs(self, layer: int, output: torch.Tensor) -> None:
        layout = self.layout
        started = time.perf_counter()
        if self.captures or self.choices:
            self.choose_heads(layer, output.view(len(output), self.tables.local_heads, -1))
            if layout.scale is not None and self.choices:
                layout.scale[layer] = self.tables.scale[layer].index_select(0, layout.slots)
        if layer not in layout.layers:
            return
        scale = None if layout.scale is None else layout.scale[layer]
        try:
            self._edit(
                layer, output, layout.rows, layout.slots, layer in layout.shift_layers, scale
            )
        except Exception:
            # Nothing was written yet: once more, request by request, to find whose edit it is.
            self._each(layout.spans, lambda span: self._edit_span(layer, output, span))
        self.affine_done.add(layer)
        self.seconds += time.perf_counter() - started

    def _each(self, items: list[Item] | tuple[Item, ...], run: Callable[[Item], None]) -> None:
        for item in items:
            try:
                run(item)
            except Exception as error:
                self.failures.setdefault(item.request_id, error)

    def _edit_span(self, layer: int, output: torch.Tensor, span: Span) -> None:
        slots = torch.full((span.stop - span.start,), span.slot, dtype=torch.int64)
        shifted = bool(self.tables.shifted[span.slot, layer])
        self._edit(layer, output, slice(span.start, span.stop), slots, shifted)

    def _edit(
        self,
        layer: int,
        output: torch.Tensor,
        rows: Rows,
        slots: torch.Tensor,
        shifted: bool,
        scale: torch.Tensor | None = None,
    ) -> None:
        tables = self.tables
        if scale is None:
            scale = tables.scale[layer].index_select(0, slots)
        shift = tables.shift[layer].index_select(0, slots) if shifted else None
        heads = output.view(output.shape[0], tables.local_heads, -1)
        head_affine_(heads, rows, scale, shift)

    def collect(self) -> None:
        if self.readings is not None:
            self.readings.flush()


class CpuPlanner:
    """Plans the steps of a CPU worker."""

    def __init__(self, tables: SlotTables, gather: Gather = identity) -> None:
        self.tables = tables
        self.sink_tags = SinkTags()
        self._scale = partial(choose_heads, own=tables.heads, gather=gather)
        self._layout: RowLayout | None = None

    def plan(self, step: Scheduled) -> CpuStepPlan:
        """The plan of a step that has something to do."""
        spans = tuple(step.spans)
        # In steady decode the batch does not change, and neither does its layout.
        if self._layout is None or self._layout.spans != spans:
            self._layout = RowLayout.of(spans, self.tables)
        return CpuStepPlan(
            self.tables,
            spans,
            tuple(step.sink_rows),
            self._layout,
            np.array(step.positions, dtype=np.int32),
            self.sink_tags,
            Readings(self.tables, step.readings, step.mass_rows) if step.readings else None,
            tuple(step.probe_rows),
            captures=tuple(step.captures),
            choices=tuple(step.choices),
            scale=self._scale,
            tape=self._tape(step),
        )

    def _tape(self, step: Scheduled) -> SaliencyTape | None:
        if not step.saliency_rows or step.rotary_positions is None:
            return None
        index = torch.tensor([row.row for row in step.saliency_rows])
        positions = step.rotary_positions.index_select(-1, index)
        rows = tuple(step.saliency_rows)
        return SaliencyTape(self.tables, rows, positions, self.sink_tags.layer)

    def changed(self) -> None:
        """A slot or a row of tags was taken or given back."""
        self._layout = None

    def reserve(self, readings: RequestReadings) -> None:
        """What is read goes to the host at once."""

    def release(self, readings: RequestReadings) -> None:
        """A request that reads leaves the batch: its readings are on the host already."""
