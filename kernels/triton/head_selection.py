"""Head selection on the GPU: the scale of a layer's heads without asking the host.

The formula is that of `headway.kernels.head_selection`. One program decides all heads of a layer,
so that the layer's own attention output is scaled in the same forward pass that decides it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from headway.kernels.triton.specialisation import Specialisation

MAX_TILE = 4096  # values of z, and of z_text, that the program holds at a time
NUM_WARPS = 4


@triton.jit
def above_mean_and_std(x: tl.tensor, real: tl.tensor, NUM_HEADS: tl.constexpr) -> tl.tensor:
    """bool [HEADS_BLOCK]: x > mean + std over the real heads; of a single head, std is NaN."""
    mean = tl.div_rn(tl.sum(tl.where(real, x, 0.0), axis=0), NUM_HEADS * 1.0)
    distance = tl.where(real, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(distance * distance, axis=0), NUM_HEADS - 1.0)
    return x > mean + tl.sqrt_rn(variance)


@triton.jit
def head_selection_kernel(
    scale: tl.tensor,
    z: tl.tensor,
    z_text: tl.tensor,
    alpha: tl.tensor,
    scale_stride: tl.tensor,
    z_stride: tl.tensor,
    z_text_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    head = tl.arange(0, HEADS_BLOCK)
    real = head < NUM_HEADS
    squares = tl.zeros([HEADS_BLOCK, COLUMNS], dtype=tl.float32)
    text_squares = tl.zeros([HEADS_BLOCK, COLUMNS], dtype=tl.float32)
    for start in range(0, HEAD_SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = real[:, None] & (column < HEAD_SIZE)[None, :]
        place = z + head[:, None] * z_stride + column[None, :]
        both = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        place = z_text + head[:, None] * z_text_stride + column[None, :]
        text = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        squares += (both - text) * (both - text)
        text_squares += text * text
    difference = tl.sqrt_rn(tl.sum(squares, axis=1))
    activity = tl.sum(text_squares, axis=1)
    outlier = above_mean_and_std(difference, real, NUM_HEADS)
    outlier = outlier & above_mean_and_std(activity, real, NUM_HEADS)
    difference = tl.where(outlier, 0.0, difference)

    # The median is the value with at most (n - 1) // 2 values below it, and more at or below it.
    # Padding is above everything, so that it neither counts nor is the median.
    difference = tl.where(real, difference, float("inf"))
    below = tl.sum((difference[None, :] < difference[:, None]).to(tl.int32), axis=1)
    at_or_below = tl.sum((difference[None, :] <= difference[:, None]).to(tl.int32), axis=1)
    middle = (NUM_HEADS - 1) // 2
    is_median = (below <= middle) & (at_or_below > middle)
    median = tl.max(tl.where(is_median, difference, float("-inf")), axis=0)
    scales = tl.where(difference > median, alpha, 1.0)
    tl.store(scale + head * scale_stride, scales, mask=real)


def select_heads_(scale: torch.Tensor, z: torch.Tensor, z_text: torch.Tensor, alpha: float) -> None:
    """Write the scale of every head of a layer: alpha for the selected heads, 1 for the others.

    scale: float32 [num_heads], any stride, such as a column of head words.
    z, z_text: [num_heads, head_size], the attention output of the last prompt position with the
    image and without; float32, bfloat16 or float16, not necessarily the same; last stride 1.

    Raises ValueError if the shapes do not fit.
    """
    num_heads, head_size = z.shape
    if z_text.shape != z.shape or scale.shape != (num_heads,):
        raise ValueError(
            f"scale {tuple(scale.shape)}, z {tuple(z.shape)} and z_text {tuple(z_text.shape)} "
            "do not fit"
        )
    if z.stride(1) != 1 or z_text.stride(1) != 1:
        raise ValueError("the last stride of z and z_text must be 1")
    head_selection_kernel[(1,)](
        scale,
        z,
        z_text,
        float(alpha),
        scale.stride(0),
        z.stride(0),
        z_text.stride(0),
        **_constants(num_heads, head_size),
        num_warps=NUM_WARPS,
    )


def _constants(num_heads: int, head_size: int) -> dict[str, int]:
    heads_block = triton.next_power_of_2(num_heads)
    return {
        "NUM_HEADS": num_heads,
        "HEADS_BLOCK": heads_block,
        "HEAD_SIZE": head_size,
        "COLUMNS": min(max(1, MAX_TILE // heads_block), triton.next_power_of_2(head_size)),
    }


def specialisations() -> Iterator[Specialisation]:
    """Every dtype and head size, with 32 heads, and with 9 of the head size of the small models."""
    for dtype in ("bf16", "fp16", "fp32"):
        for num_heads, head_size in ((9, 64), (32, 64), (32, 80), (32, 96), (32, 128), (32, 256)):
            yield Specialisation(
                kernel="head_selection",
                name=f"{dtype}-{num_heads}x{head_size}",
                function=head_selection_kernel,
                signature={
                    "scale": "*fp32",
                    "z": f"*{dtype}",
                    "z_text": f"*{dtype}",
                    "alpha": "fp32",
                    "scale_stride": "i32",
                    "z_stride": "i32",
                    "z_text_stride": "i32",
                },
                constants=_constants(num_heads, head_size),
                aligned=("z", "z_text", "z_stride", "z_text_stride"),
                num_warps=NUM_WARPS,
                head_size=head_size,
                dtype=dtype,
            )
