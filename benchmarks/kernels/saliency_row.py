"""Launches of the saliency row kernels to time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from headway.benchmarks.kernels import model
from headway.benchmarks.kernels.device import Case
from headway.kernels.triton.saliency_row import saliency_rows

CANDIDATES, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 5, 32, 8, 128, 16
CONTEXTS = 600, 4096


def cases() -> Iterator[Case]:
    """One request that weighs 5 candidates, after a short and a long context."""
    for context in CONTEXTS:
        num_blocks = -(-context // BLOCK_SIZE)
        query = torch.randn(1, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
        grad_output = torch.randn(1, CANDIDATES, HEADS, HEAD_SIZE, device="cuda")
        shape = num_blocks, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
        kv_cache = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        block_table = torch.randperm(num_blocks, device="cuda").to(torch.int32)[None]
        seq_lens = torch.full((1,), context, dtype=torch.int32, device="cuda")
        saliency = torch.empty(1, CANDIDATES, context, device="cuda")
        lse = torch.empty(1, HEADS, device="cuda")
        inputs = query, grad_output, kv_cache, block_table, seq_lens, HEAD_SIZE**-0.5, lse
        case = f"K = {CANDIDATES}, {context} keys"
        work = model.saliency_row(case, CANDIDATES, context, HEADS, KV_HEADS, HEAD_SIZE)
        yield Case(work, partial(saliency_rows, saliency, *inputs))
