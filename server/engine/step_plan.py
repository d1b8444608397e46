"""What steering does in one engine step: which rows of the batch belong to which slot.

The runner adapter makes a plan before the forward pass, the attention layers carry it out, and
the adapter closes it afterwards. `current` is the one place where they meet: it has one writer,
the adapter.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from headway.kernels.head_affine import Rows, head_affine_
from headway.server.engine.slots import SlotTables

GATHER_LIMIT = 1 << 22
"""Largest number of scales gathered for all layers at once; beyond it, layer by layer."""


@dataclass(frozen=True)
class Span:
    """Consecutive rows of the batch that belong to one steered request."""

    request_id: str
    slot: int
    start: int
    stop: int


@dataclass
class RowLayout:
    """The rows of some spans, laid out for the kernels; kept while the batch stays the same.

    rows: the rows to edit; slots: int64 [num_rows], the slot of each; layers: edited by any.
    """

    spans: tuple[Span, ...]
    rows: Rows
    slots: torch.Tensor
    layers: frozenset[int]
    shift_layers: frozenset[int]
    scale: torch.Tensor | None  # [num_layers, num_rows, heads] where it was gathered at once

    @classmethod
    def of(cls, spans: tuple[Span, ...], tables: SlotTables) -> RowLayout:
        """Lay out spans given in ascending order of rows."""
        index = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        counts = [span.stop - span.start for span in spans]
        used = [span.slot for span in spans]
        slots = torch.from_numpy(np.repeat(np.array(used, dtype=np.int64), counts))
        contiguous = index[-1] - index[0] + 1 == len(index)
        rows = slice(int(index[0]), int(index[-1]) + 1) if contiguous else torch.from_numpy(index)
        num_layers, _, heads = tables.scale.shape
        gathered = None
        if num_layers * len(index) * heads <= GATHER_LIMIT:
            gathered = tables.scale.index_select(1, slots)
        layers = np.flatnonzero(tables.edited[used].any(axis=0))
        shift_layers = np.flatnonzero(tables.shifted[used].any(axis=0))
        return cls(
            spans,
            rows,
            slots,
            frozenset(layers.tolist()),
            frozenset(shift_layers.tolist()),
            gathered,
        )


@dataclass
class StepPlan:
    """One step's plan and what came of it.

    failures: request id -> error, for requests whose edit raised in this step.
    layers_done: layers whose edit ran.
    seconds: time spent in steering code during this step.
    """

    tables: SlotTables
    layout: RowLayout
    seconds: float = 0.0
    failures: dict[str, Exception] = field(default_factory=dict)
    layers_done: set[int] = field(default_factory=set)

    def edit_head_outputs(self, layer: int, output: torch.Tensor) -> None:
        """Apply the affine edits of a layer to its attention output, in place; never raises.

        output: [num_tokens, num_heads, head_size], or the same flattened to two dimensions.
        """
        layout = self.layout
        if layer not in layout.layers:
            return
        started = time.perf_counter()
        scale = None if layout.scale is None else layout.scale[layer]
        try:
            self._edit(
                layer, output, layout.rows, layout.slots, layer in layout.shift_layers, scale
            )
        except Exception:
            # Nothing was written yet: once more, request by request, to find whose edit it is.
            self._edit_each(layer, output)
        self.layers_done.add(layer)
        self.seconds += time.perf_counter() - started

    def _edit_each(self, layer: int, output: torch.Tensor) -> None:
        for span in self.layout.spans:
            rows = slice(span.start, span.stop)
            slots = torch.full((span.stop - span.start,), span.slot, dtype=torch.int64)
            shifted = bool(self.tables.shifted[span.slot, layer])
            try:
                self._edit(layer, output, rows, slots, shifted)
            except Exception as error:
                self.failures.setdefault(span.request_id, error)

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
        heads = output.view(output.shape[0], tables.scale.shape[2], -1)
        head_affine_(heads, rows, scale, shift)


@dataclass
class Current:
    """Holds the plan of the step that is running; None outside of steered steps."""

    plan: StepPlan | None = None


current = Current()
