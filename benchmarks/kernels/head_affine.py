"""Launches of the head affine kernel to time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from headway.benchmarks.kernels import model
from headway.benchmarks.kernels.device import Case
from headway.kernels.head_word import Field
from headway.kernels.triton.head_affine import head_affine_

ROWS, HEADS, HEAD_SIZE = 16, 32, 128


def cases() -> Iterator[Case]:
    """A decode step of 16 requests, each with its own words; without and with shifts."""
    z = torch.randn(ROWS, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
    row_slots = torch.arange(ROWS, dtype=torch.int32, device="cuda")
    words = torch.zeros(ROWS, HEADS, len(Field), device="cuda")
    words[..., Field.SCALE] = -1.0  # an edit that may be repeated without end
    words[..., Field.SHIFT_INDEX] = -1.0
    work = model.head_affine("16 rows", ROWS, HEADS, HEAD_SIZE, shift=False)
    yield Case(work, partial(head_affine_, z, row_slots, words))

    shifted = words.clone()
    shifted[..., Field.SHIFT_INDEX] = torch.arange(ROWS * HEADS, device="cuda").view(ROWS, HEADS)
    shifts = torch.randn(ROWS * HEADS, HEAD_SIZE, device="cuda")
    work = model.head_affine("16 rows, shifted", ROWS, HEADS, HEAD_SIZE, shift=True)
    yield Case(work, partial(head_affine_, z, row_slots, shifted, shifts))

    none = torch.full_like(row_slots, -1)
    work = model.Work("head_affine", "16 rows, none steered", read=4 * ROWS, written=0)
    yield Case(work, partial(head_affine_, z, none, words))
