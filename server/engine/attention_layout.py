"""The rows whose attention weights are edited, laid out for the segment attention kernel."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from headway.kernels.segment_attention import Sequences, segment_attention
from headway.server.engine.slots import SlotTables
from headway.server.engine.step_plan import AttentionCall, Span

if TYPE_CHECKING:
    from headway.server.engine.cpu_plan import CpuStepPlan


class AttentionGroup:
    """The spans that are edited together at some layers."""

    def __init__(self, spans: tuple[Span, ...], indices: np.ndarray, tables: SlotTables) -> None:
        self.tables = tables
        self.indices = indices
        chosen = [spans[index] for index in indices]
        self._slots = torch.tensor([span.slot for span in chosen])
        columns = {
            "first_row": [span.start for span in chosen],
            "num_rows": [span.stop - span.start for span in chosen],
            "prompt_len": [span.prompt_len for span in chosen],
            "table_row": [span.sequence for span in chosen],
            "tag_row": [span.tag_row for span in chosen],
            "mass_row": [span.mass_row for span in chosen],
        }
        self._columns = {
            name: torch.tensor(values, dtype=torch.int32) for name, values in columns.items()
        }
        # Sequences all of whose rows are edited, and so need nothing of the base kernel.
        edited: dict[int, int] = {}
        scheduled: dict[int, int] = {}
        for span in chosen:
            edited[span.sequence] = edited.get(span.sequence, 0) + span.stop - span.start
            scheduled[span.sequence] = span.num_scheduled
        whole = [sequence for sequence in edited if edited[sequence] == scheduled[sequence]]
        self._whole = torch.tensor(whole, dtype=torch.int64)
        self._whole_lens = torch.tensor([scheduled[each] for each in whole], dtype=torch.int32)
        self._words: dict[int, torch.Tensor] = {}
        # Weak: layouts outlive steps, and a step, which has its layout, may hold large tensors.
        self._step: weakref.ref[CpuStepPlan] | None = None
        self._seq_lens: dict[int, torch.Tensor | None] = {}
        self._sequences: Sequences | None = None

    def base_seq_lens(self, step: CpuStepPlan, seq_lens: torch.Tensor) -> torch.Tensor | None:
        """Sequence lengths for the base kernel; None if it has nothing to compute.

        The kernel finds the keys of a query from these lengths, so that a sequence as long as its
        own rows costs next to nothing, and its rows are overwritten afterwards. How it divides the
        other sequences among threads was decided before, from the true lengths: their results keep
        their bits.
        """
        self._begin(step)
        key = seq_lens.data_ptr()
        if key not in self._seq_lens:
            pretended: torch.Tensor | None = None
            if len(self._whole) < len(seq_lens):
                pretended = seq_lens.clone()
                pretended[self._whole] = self._whole_lens.to(seq_lens.dtype)
            self._seq_lens[key] = pretended
        return self._seq_lens[key]

    def run(
        self,
        step: CpuStepPlan,
        layer: int,
        call: AttentionCall,
        slot_tags: torch.Tensor | None,
        masses: torch.Tensor | None,
    ) -> None:
        """Compute the attention of these spans at a layer. Raises KernelError."""
        self._begin(step)
        if layer not in self._words:
            self._words[layer] = self.tables.words[layer].index_select(0, self._slots)
        if self._sequences is None:
            positions = torch.from_numpy(np.ascontiguousarray(step.positions[self.indices]))
            columns = dict(self._columns)
            if masses is None:
                columns["mass_row"] = torch.full_like(columns["mass_row"], -1)
            self._sequences = Sequences(position=positions, **columns)
        segment_attention(
            call.query,
            call.kv_cache,
            call.output,
            call.block_table,
            self._sequences,
            self._words[layer],
            call.softmax_scale,
            call.soft_cap,
            call.sliding_window,
            self.tables.tags,
            slot_tags,
            masses,
        )

    def _begin(self, step: CpuStepPlan) -> None:
        if self._step is None or self._step() is not step:
            self._step, self._sequences = weakref.ref(step), None
            self._seq_lens.clear()


class AttentionLayout:
    """Groups of spans by layer; layers at which the same spans are edited share a group."""

    def __init__(self, spans: tuple[Span, ...], tables: SlotTables) -> None:
        self.spans = spans
        self.tables = tables
        self._attends = tables.attends[[span.slot for span in spans]]
        self.layers = frozenset(np.flatnonzero(self._attends.any(axis=0)).tolist())
        self._groups: dict[int, AttentionGroup] = {}

    def group(self, layer: int) -> AttentionGroup:
        """The spans to edit at a layer."""
        if layer not in self._groups:
            chosen = np.flatnonzero(self._attends[:, layer])
            same = (g for g in self._groups.values() if np.array_equal(g.indices, chosen))
            group = next(same, None) or AttentionGroup(self.spans, chosen, self.tables)
            self._groups[layer] = group
        return self._groups[layer]

    def alone(self, span: Span) -> AttentionGroup:
        """A group of one span."""
        return AttentionGroup(self.spans, np.array([self.spans.index(span)]), self.tables)
