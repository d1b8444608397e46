"""What the attention kernel reads while it edits: masses of key classes, conditions met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headway.kernels.head_word import Mass
from headway.server.engine.slots import SlotTables

if TYPE_CHECKING:
    from headway.server.engine.step_plan import Span

BUFFER_LIMIT = 1 << 22
"""Most floats kept before they are added up."""

CLASSES = (Mass.A, Mass.B, Mass.IMAGE)


@dataclass
class RequestReadings:
    """Readings of one request, over all its sequences.

    met, considered: (query, head, layer) triples whose edit has a condition, and those where it
    held. last, total: float64 [num_layers, local heads, 3], masses of class A, class B and image
    at the last position and added up over `outputs` output positions; kept where `wants_masses`.
    parts: what was read on a device and is still there; fetch: brings it here.
    """

    wants_masses: bool = False
    met: int = 0
    considered: int = 0
    outputs: int = 0
    last: np.ndarray | None = None
    total: np.ndarray | None = None
    parts: list[torch.Tensor] = field(default_factory=list)
    fetch: Callable[[RequestReadings], None] | None = None

    def masses(self, tables: SlotTables) -> tuple[np.ndarray, np.ndarray]:
        """`last` and `total`, made when first asked for."""
        if self.last is None or self.total is None:
            shape = tables.geometry.num_layers, tables.local_heads, len(CLASSES)
            self.last, self.total = np.zeros(shape), np.zeros(shape)
        return self.last, self.total

    def as_dict(self, heads: slice) -> dict[str, Any]:
        """Plain values; heads: those of this rank, for their global indices."""
        if self.fetch is not None:
            self.fetch(self)
        masses = []
        if self.last is not None and self.total is not None:
            for layer, head in np.argwhere(self.last.any(axis=-1) | self.total.any(axis=-1)):
                mean = (self.total[layer, head] / max(self.outputs, 1)).tolist()
                last = self.last[layer, head].tolist()
                masses.append([int(layer), int(head) + heads.start, last, mean])
        return {"met": self.met, "considered": self.considered, "masses": masses}


@dataclass
class Readings:
    """Readings of the spans of one step.

    spans: those with a mass_row, in its order, each with the RequestReadings it adds to and the
    first of its rows that is an output position.
    """

    tables: SlotTables
    spans: list[tuple[Span, RequestReadings, int]]
    num_rows: int
    _layers: list[int] = field(default_factory=list)
    _buffer: torch.Tensor | None = None

    def buffer(self, layer: int) -> torch.Tensor:
        """float32 [num_rows, local heads, len(Mass)] for the kernel to fill at a layer."""
        heads = self.tables.local_heads
        if self._buffer is None:
            size = self.num_rows * heads * len(Mass)
            depth = min(max(BUFFER_LIMIT // size, 1), self.tables.geometry.num_layers)
            self._buffer = torch.empty(depth, self.num_rows, heads, len(Mass))
        if len(self._layers) == len(self._buffer):
            self.flush()
        buffer = self._buffer[len(self._layers)].zero_()
        self._layers.append(layer)
        return buffer

    def flush(self) -> None:
        """Add up what was read since the last flush."""
        if not self._layers or self._buffer is None:
            return
        values, layers = self._buffer[: len(self._layers)].numpy(), self._layers
        self._layers = []
        counts = [span.stop - span.start for span, _, _ in self.spans]
        slots = [span.slot for span, _, _ in self.spans]
        conditional = self.tables.conditional[np.ix_(slots, layers)]  # [spans, layers, heads]
        considered = conditional.sum(axis=(1, 2)) * counts
        first = [span.mass_row for span, _, _ in self.spans]
        held = np.add.reduceat(values[..., Mass.EDITED], first, axis=1)  # [layers, spans, heads]
        met = np.einsum("lsh,slh->s", held, conditional)
        for index, (span, readings, outputs_from) in enumerate(self.spans):
            readings.met += round(float(met[index]))
            readings.considered += int(considered[index])
            if readings.wants_masses:
                rows = slice(first[index], first[index] + counts[index])
                edited = self.tables.edited_heads[span.slot][layers]
                masses = values[:, rows, :, : len(CLASSES)] * edited[:, None, :, None]
                self._keep(masses, layers, readings, outputs_from)

    def _keep(
        self, masses: np.ndarray, layers: list[int], readings: RequestReadings, outputs_from: int
    ) -> None:
        last, total = readings.masses(self.tables)
        last[layers] = masses[:, -1]
        total[layers] += masses[:, outputs_from:].sum(axis=1)
