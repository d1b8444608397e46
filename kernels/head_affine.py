"""Head affine: z_{t,h} <- scale_{t,h} * z_{t,h} + shift_{t,h} on the output of attention.

The affine part of the head word. It acts before the output projection, so that every query head
is edited by itself also under grouped-query attention. Arithmetic is float32 whatever the dtype
of z, rounded once when z is written; with scale 1 and no shift z keeps its bits.
"""

from __future__ import annotations

import torch

Rows = slice | torch.Tensor
"""Rows to edit: a slice where they are contiguous, else int64 indices without repetition."""


def head_affine_reference(
    z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula, row by row and head by head, in float32.

    z: [num_rows, num_heads, head_size]; scale: [num_rows, num_heads];
    shift: [num_rows, num_heads, head_size] or None. Returns float32, shaped as z.
    """
    out = torch.empty(z.shape, dtype=torch.float32)
    for row in range(z.shape[0]):
        for head in range(z.shape[1]):
            out[row, head] = float(scale[row, head]) * z[row, head].float()
            if shift is not None:
                out[row, head] += shift[row, head].float()
    return out


def head_affine_(
    z: torch.Tensor, rows: Rows, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> None:
    """Edit the given rows of z in place; no other row is touched.

    z: [num_tokens, num_heads, head_size], float32, bfloat16 or float16.
    scale: float32 [num_rows, num_heads]; shift: float32 [num_rows, num_heads, head_size] or None.

    Either all rows are written or, where it raises, none.
    """
    factor = scale.unsqueeze(-1)
    if isinstance(rows, slice) and shift is None:
        z[rows].mul_(factor)
        return
    edited = z[rows] * factor if shift is None else torch.addcmul(shift, z[rows].float(), factor)
    z[rows] = edited.to(z.dtype)
