"""Launches of the sink tag kernel to time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from headway.benchmarks.kernels import model
from headway.benchmarks.kernels.device import Case
from headway.kernels.triton.sink_tags import tag_sinks_

ROWS, HIDDEN = 2048, 4096


def cases() -> Iterator[Case]:
    """A prompt chunk of 2048 rows, all decided by one rule."""
    hidden_states = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    residual = torch.randn_like(hidden_states)
    slot_tags = torch.zeros(4 * ROWS, dtype=torch.uint8, device="cuda")
    slot_mapping = torch.arange(ROWS, device="cuda")
    row_rules = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
    rule_tau = torch.full((1,), 20.0, device="cuda")
    rule_dims = torch.tensor([[1415, 2533]], dtype=torch.int32, device="cuda")
    rule = row_rules, rule_tau, rule_dims
    work = model.sink_tags("2048 rows", ROWS, HIDDEN)
    yield Case(work, partial(tag_sinks_, slot_tags, hidden_states, residual, slot_mapping, *rule))
