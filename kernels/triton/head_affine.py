"""Head affine on the GPU: z_{t,h} <- scale_{t,h} * z_{t,h} + shift_{t,h}, from the head words.

The formula, its place before the output projection and its rounding are those of
`headway.kernels.head_affine`. Here the edits are looked up on the device: a row names the slot of
its request, the slot holds a head word per head. One program edits one (row, head), so the grid
is known from the shape of z alone and the launch can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from headway.kernels.head_word import Field
from headway.kernels.triton.specialisation import Specialisation

SCALE = tl.constexpr(int(Field.SCALE))
SHIFT_INDEX = tl.constexpr(int(Field.SHIFT_INDEX))

NUM_WARPS = 1  # a head is at most a few hundred values


@triton.jit
def head_affine_kernel(
    z: tl.tensor,
    row_slots: tl.tensor,
    words: tl.tensor,
    shifts: tl.tensor,
    z_row_stride: tl.tensor,
    z_head_stride: tl.tensor,
    words_slot_stride: tl.tensor,
    words_head_stride: tl.tensor,
    shifts_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    word = words + slot.to(tl.int64) * words_slot_stride + head * words_head_stride
    scale = tl.load(word + SCALE)
    shift_index = tl.load(word + SHIFT_INDEX)
    if shifts is None:
        shift_index = -1.0
    if (scale == 1.0) & (shift_index < 0.0):
        return
    column = tl.arange(0, BLOCK)
    inside = column < HEAD_SIZE
    place = z + row * z_row_stride + head * z_head_stride + column
    edited = scale * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if shifts is not None and shift_index >= 0.0:
        shift = shifts + shift_index.to(tl.int64) * shifts_stride
        edited += tl.load(shift + column, mask=inside, other=0.0)
    tl.store(place, edited.to(z.dtype.element_ty), mask=inside)


def head_affine_(
    z: torch.Tensor,
    row_slots: torch.Tensor,
    words: torch.Tensor,
    shifts: torch.Tensor | None = None,
) -> None:
    """Edit z in place as the rows' head words say; all other rows and heads keep their bits.

    z: [num_tokens, num_heads, head_size], float32, bfloat16 or float16, last stride 1.
    row_slots: int32 [>= num_tokens], the row of `words` for this token, -1 where it is not steered.
    words: float32 [capacity, num_heads, >= len(Field)], last stride 1; SHIFT_INDEX < 0: no shift.
    shifts: float32 [num_shifts, head_size], last stride 1; None: SHIFT_INDEX is not looked at.

    A head with scale 1 and no shift is not touched. Raises ValueError if the shapes do not fit.
    """
    num_tokens, num_heads, head_size = z.shape
    if row_slots.shape[0] < num_tokens or words.shape[1] != num_heads or z.stride(2) != 1:
        raise ValueError(
            f"z {tuple(z.shape)} strides {z.stride()}, row_slots {tuple(row_slots.shape)} and "
            f"words {tuple(words.shape)} do not fit"
        )
    if num_tokens == 0:
        return
    head_affine_kernel[(num_tokens, num_heads)](
        z,
        row_slots,
        words,
        shifts,
        z.stride(0),
        z.stride(1),
        words.stride(0),
        words.stride(1),
        0 if shifts is None else shifts.stride(0),
        HEAD_SIZE=head_size,
        BLOCK=triton.next_power_of_2(head_size),
        num_warps=NUM_WARPS,
    )


def specialisations() -> Iterator[Specialisation]:
    """Every dtype and head size, with and without shifts."""
    for dtype in ("bf16", "fp16", "fp32"):
        for head_size in (64, 80, 96, 128, 256):
            for shifted in (False, True):
                signature = {
                    "z": f"*{dtype}",
                    "row_slots": "*i32",
                    "words": "*fp32",
                    "shifts": "*fp32",
                    "z_row_stride": "i32",
                    "z_head_stride": "i32",
                    "words_slot_stride": "i32",
                    "words_head_stride": "i32",
                    "shifts_stride": "i32",
                }
                constants = {"HEAD_SIZE": head_size, "BLOCK": triton.next_power_of_2(head_size)}
                aligned = ["z", "row_slots", "words", "z_row_stride", "z_head_stride"]
                if shifted:
                    aligned += ["shifts", "shifts_stride"]
                else:
                    del signature["shifts"]
                    constants["shifts"] = None
                yield Specialisation(
                    kernel="head_affine",
                    name=f"{dtype}-{head_size}" + ("-shift" if shifted else ""),
                    function=head_affine_kernel,
                    signature=signature,
                    constants=constants,
                    aligned=tuple(aligned),
                    num_warps=NUM_WARPS,
                    head_size=head_size,
                    dtype=dtype,
                )
