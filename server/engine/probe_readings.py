"""What the probes of residual edits read at the last position of a prompt, kept for feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from headway.server.engine.slots import ResidualPart


@dataclass
class ProbeReadings:
    """Readings of one request.

    request_id: of the sequence that they are of. rows: point -> float32 bytes [hidden_size], x /
    rms(x) of the stream before the edit at this point and after those below it; clusters: point ->
    which one the probe picks for it. A prompt that is computed again is read again.
    """

    request_id: str
    rows: dict[int, bytes] = field(default_factory=dict)
    clusters: dict[int, int] = field(default_factory=dict)

    def as_list(self) -> list[list[Any]]:
        """Plain values: [point, cluster, row], by point."""
        return [[point, self.clusters[point], self.rows[point]] for point in sorted(self.rows)]


@dataclass(frozen=True)
class ProbeRow:
    """A row of the batch that is to be kept as its probes read it.

    row: its index in the batch; slot: that of its edits.
    """

    request_id: str
    row: int
    slot: int
    kept: ProbeReadings

    def read(
        self,
        point: int,
        parts: Mapping[int, ResidualPart],
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        """Keep the row at a point, unless no probe picks there; parts: those of its slot.

        Of two logits that differ by rounding alone the edit may have picked the other one.
        """
        edit = parts[point].edit if point in parts else None
        if edit is None or edit.probe_weights is None or edit.probe_bias is None:
            return
        stream = hidden_states[self.row].float()
        if residual is not None:
            stream = stream + residual[self.row].float()
        rms = stream.square().mean().sqrt()
        unit = stream / rms.clamp_min(torch.finfo(torch.float32).tiny)
        logits = torch.addmv(edit.probe_bias, edit.probe_weights, unit)
        self.kept.clusters[point] = int(logits.argmax())
        self.kept.rows[point] = unit.numpy().astype("<f4").tobytes()
