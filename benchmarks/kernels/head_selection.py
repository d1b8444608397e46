"""Launches of the head selection kernel to time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from headway.benchmarks.kernels import model
from headway.benchmarks.kernels.device import Case
from headway.kernels.triton.head_selection import select_heads_

HEADS, HEAD_SIZE = 32, 128


def cases() -> Iterator[Case]:
    """One layer of one request."""
    z = torch.randn(HEADS, HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
    z_text = torch.randn_like(z)
    scale = torch.empty(HEADS, device="cuda")
    work = model.head_selection(f"{HEADS} heads of {HEAD_SIZE}", HEADS, HEAD_SIZE)
    yield Case(work, partial(select_heads_, scale, z, z_text, 1.2))
