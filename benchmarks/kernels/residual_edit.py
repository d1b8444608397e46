"""Launches of the residual edit kernel to time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from headway.benchmarks.kernels import model
from headway.benchmarks.kernels.device import Case
from headway.kernels.triton.residual_edit import residual_edit_

ROWS, HIDDEN, CLUSTERS = 16, 4096, 5


def cases() -> Iterator[Case]:
    """A decode step of 16 requests that share one edit, and that have each their own."""
    hidden_states = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    residual = torch.randn_like(hidden_states)
    for edits, name in ((1, "1 edit"), (ROWS, f"{ROWS} edits")):
        row_slots = torch.arange(ROWS, dtype=torch.int32, device="cuda")
        slot_edits = row_slots % edits
        # So weak that thousands of repetitions do not blow the rows up.
        strengths = torch.full((ROWS,), 1e-6, device="cuda")
        probe_weights = torch.randn(edits, CLUSTERS, HIDDEN, device="cuda")
        probe_bias = torch.randn(edits, CLUSTERS, device="cuda")
        directions = torch.randn(edits, CLUSTERS, HIDDEN, device="cuda")
        forms = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
        tables = row_slots, slot_edits, strengths, forms, probe_weights, probe_bias, directions
        case = f"{ROWS} rows, {name} of {CLUSTERS} clusters"
        work = model.residual_edit(case, ROWS, HIDDEN, CLUSTERS, edits)
        yield Case(work, partial(residual_edit_, hidden_states, residual, *tables))
