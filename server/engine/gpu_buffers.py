"""What the GPU kernels read in a step: persistent buffers, changed only where the batch changes.

In steady decode nothing is uploaded: which row has which slot stays the same, and positions are
found on the device from vLLM's own sequence lengths.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from headway.server.engine.gpu_tables import GpuTables, upload
from headway.server.engine.step_plan import Scheduled

MAX_SINK_DIMS = 64
"""Most dimensions that a rule for sinks may look at: as many as a request may name."""


class StepBuffers:
    """Filled by `load` for the steered steps, emptied by `clear` before the first that is not.

    row_slots: int32 [max_num_tokens], -1 for rows that nobody steers.
    row_rules: int32 [max_num_tokens], index of the request whose rule for sinks decides a row.
    prompt_lens, tag_rows, reading_rows: int32 [max_num_seqs], by request of the batch.
    rule_dims: int32 [max_num_seqs, MAX_SINK_DIMS]; rule_tau: float32 [layers, max_num_seqs], < 0
        where a request asks for no sinks.
    replaced: uint8 [layers, max_num_seqs], where all rows of a request are computed by Headway;
    base_seq_lens: int32, as replaced: what the base kernel is told.
    """

    def __init__(self, tables: GpuTables, max_num_tokens: int, device: torch.device | str) -> None:
        self.tables = tables
        layers, requests = len(tables.layers), tables.max_num_seqs

        def full(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.row_slots = full(-1, torch.int32, max_num_tokens)
        self.row_rules = full(-1, torch.int32, max_num_tokens)
        self.prompt_lens = full(0, torch.int32, requests)
        self.tag_rows = full(-1, torch.int32, requests)
        self.reading_rows = full(-1, torch.int32, requests)
        self.rule_dims = full(-1, torch.int32, requests, MAX_SINK_DIMS)
        self.rule_tau = full(-1.0, torch.float32, layers, requests)
        self.replaced = full(0, torch.uint8, layers, requests)
        self.base_seq_lens = full(0, torch.int32, layers, requests)
        self._rows = self._rule_rows = 0

    def load(self, step: Scheduled, reading_rows: Mapping[int, int]) -> None:
        """Describe a step. reading_rows: request of the batch -> its row of the readings.

        Raises ValueError, before anything is uploaded, for a rule that does not fit.
        """
        tables = self.tables
        rows = np.full(step.num_tokens, -1, dtype=np.int32)
        by_request = np.full((3, tables.max_num_seqs), -1, dtype=np.int32)
        edited = np.zeros((len(tables.layers), tables.max_num_seqs), dtype=np.int32)
        scheduled = np.full(tables.max_num_seqs, -1, dtype=np.int32)
        stage = slice(tables.layers.start, tables.layers.stop)
        for span in step.spans:
            rows[span.start : span.stop] = span.slot
            by_request[:, span.sequence] = (
                span.prompt_len,
                span.tag_row,
                reading_rows.get(span.sequence, -1),
            )
            scheduled[span.sequence] = span.num_scheduled
            whole = tables.edited_heads[span.slot, stage].all(axis=-1)
            edited[:, span.sequence] += whole * (span.stop - span.start)
        self._load_rules(step)
        upload(self.prompt_lens, by_request[0])
        upload(self.tag_rows, by_request[1])
        upload(self.reading_rows, by_request[2])
        upload(self.replaced, (edited == scheduled).astype(np.uint8))
        self._rows = self._fill(self.row_slots, rows, self._rows)

    def clear(self) -> None:
        """Nothing is steered: what a captured graph does when it is replayed now."""
        if self._rows:
            self._rows = self._fill(self.row_slots, np.zeros(0, np.int32), self._rows)
            self.replaced.zero_()
        if self._rule_rows:
            self._rule_rows = self._fill(self.row_rules, np.zeros(0, np.int32), self._rule_rows)

    def _load_rules(self, step: Scheduled) -> None:
        if not step.sink_rows and not self._rule_rows:
            return
        tables = self.tables
        rules = np.full(step.num_tokens if step.sink_rows else 0, -1, dtype=np.int32)
        dims = np.full((tables.max_num_seqs, MAX_SINK_DIMS), -1, dtype=np.int32)
        tau = np.full((len(tables.layers), tables.max_num_seqs), -1.0, dtype=np.float32)
        for index, each in enumerate(step.sink_rows):
            if len(each.rule.dims) > MAX_SINK_DIMS:
                raise ValueError(f"a rule of {len(each.rule.dims)} sink dimensions")
            rules[each.start : each.stop] = index
            dims[index, : len(each.rule.dims)] = each.rule.dims
            wanted = each.layers[tables.layers.start : tables.layers.stop]
            tau[wanted, index] = each.rule.tau
        upload(self.rule_dims, dims)
        upload(self.rule_tau, tau)
        self._rule_rows = self._fill(self.row_rules, rules, self._rule_rows)

    @staticmethod
    def _fill(target: torch.Tensor, values: np.ndarray, filled: int) -> int:
        """Upload the first rows, and -1 to those behind them that were filled before."""
        padded = np.full(max(len(values), filled), -1, dtype=np.int32)
        padded[: len(values)] = values
        upload(target[: len(padded)], padded)
        return len(values)
