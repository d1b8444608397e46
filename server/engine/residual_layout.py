"""The residual edits of some spans, laid out for the kernel on CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headway.kernels.residual_edit import RowEdits, residual_edit_
from headway.server.engine.slots import SlotTables
from headway.server.engine.step_plan import Span


class ResidualLayout:
    """Which rows are edited where, and how; kept while the batch stays the same.

    points: those at which any span is edited, as `num_points` counts.
    """

    def __init__(self, spans: Sequence[Span], tables: SlotTables) -> None:
        self._spans, self._tables = spans, tables
        adds = tables.adds[[span.slot for span in spans]]
        self.points = frozenset(np.flatnonzero(adds.any(axis=0)).tolist())
        self._adds = adds
        self._rows: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        self._edits: dict[int, RowEdits] = {}

    def edit(self, point: int, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Edit the rows of a point; hidden_states is changed."""
        if point not in self._edits:
            parts = self._tables.parts
            edited = [span.slot for span in self._spans if point in parts[span.slot]]
            edits = [parts[slot][point].edit for slot in edited]
            self._edits[point] = RowEdits(*self._rows_at(point), edits)
        residual_edit_(hidden_states, residual, self._edits[point])

    def alone(self, span: Span) -> ResidualLayout:
        """The layout of one of the spans."""
        return ResidualLayout([span], self._tables)

    def _rows_at(self, point: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that are edited at a point, and which of its spans each belongs to."""
        edited = self._adds[:, point]
        key = edited.tobytes()  # most requests edit the same rows at all of their points
        if key not in self._rows:
            spans = [span for span, added in zip(self._spans, edited, strict=True) if added]
            counts = [span.stop - span.start for span in spans]
            rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
            which = np.repeat(np.arange(len(spans)), counts)
            self._rows[key] = torch.from_numpy(rows), torch.from_numpy(which)
        return self._rows[key]
