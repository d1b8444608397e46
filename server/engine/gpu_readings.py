"""Readings on the GPU: the kernels add to a row per request, fetched when the report is asked for.

A row is copied on the device when its request leaves the batch; the host waits for nothing until
somebody wants the report.
"""

from __future__ import annotations

import numpy as np
import torch

from headway.kernels.head_word import Mass
from headway.kernels.triton.segment_finish import NUM_READINGS
from headway.server.engine.gpu_tables import GpuTables
from headway.server.engine.readings import CLASSES, RequestReadings

SUMS = len(Mass)
"""Columns that are added up; the next hold the masses of the last row."""

MAX_KEPT = 256
"""Most requests whose readings stay on the device after they left the batch; beyond it, which only
reports that nobody asks for bring about, the host fetches the oldest."""


class GpuReadings:
    """buffer: float32 [layers of this stage, max_num_seqs, local heads, NUM_READINGS]."""

    def __init__(self, tables: GpuTables, device: torch.device | str) -> None:
        self.tables = tables
        shape = len(tables.layers), tables.max_num_seqs, tables.local_heads, NUM_READINGS
        self.buffer = torch.zeros(shape, device=device)
        self._rows: dict[int, tuple[int, RequestReadings]] = {}
        self._kept: list[RequestReadings] = []
        self._free = list(range(tables.max_num_seqs - 1, -1, -1))

    def row_of(self, readings: RequestReadings) -> int:
        """The row that a request's masses go to. Raises RuntimeError if all rows are taken."""
        if id(readings) not in self._rows:
            if not self._free:
                raise RuntimeError(f"all {self.tables.max_num_seqs} rows of readings are taken")
            row = self._free.pop()
            self.buffer[:, row].zero_()
            self._rows[id(readings)] = row, readings
            readings.fetch = self.fetch
        return self._rows[id(readings)][0]

    def release(self, readings: RequestReadings) -> None:
        """Its request leaves the batch: keep what was read, give the row back."""
        found = self._rows.pop(id(readings), None)
        if found is not None:
            part = self.buffer[:, found[0]].clone()
            readings.parts[:] = [_joined(readings.parts[0], part) if readings.parts else part]
            self._free.append(found[0])
            self._kept = [each for each in self._kept if each is not readings] + [readings]
            while len(self._kept) > MAX_KEPT:
                self._settle(self._kept.pop(0))

    def fetch(self, readings: RequestReadings) -> None:
        """Bring a request's readings to the host, which waits for the device; for reports only."""
        self.release(readings)
        self._kept = [each for each in self._kept if each is not readings]
        self._settle(readings)

    def _settle(self, readings: RequestReadings) -> None:
        for part in readings.parts:
            self._add(part.double().cpu().numpy(), readings)
        readings.parts.clear()

    def _add(self, values: np.ndarray, readings: RequestReadings) -> None:
        readings.met += round(float(values[..., Mass.EDITED].sum()))
        if not readings.wants_masses:
            return
        layers = slice(self.tables.layers.start, self.tables.layers.stop)
        last, total = readings.masses(self.tables)
        seen = values[..., SUMS : SUMS + len(CLASSES)]
        last[layers] = np.where(seen.any(axis=-1, keepdims=True), seen, last[layers])
        total[layers] += values[..., : len(CLASSES)]


def _joined(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """Sums added, masses of the last row from the later part where it has any."""
    last = later[..., SUMS:]
    newest = torch.where(last.any(dim=-1, keepdim=True), last, earlier[..., SUMS:])
    return torch.cat([earlier[..., :SUMS] + later[..., :SUMS], newest], dim=-1)
