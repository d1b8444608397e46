"""Residual edit on the GPU: probe -> argmax -> add, one program per row.

The formulas are those of `headway.kernels.residual_edit`. The row is read twice: once for its rms
and the probe's logits, which are linear in the row and divided by rms at the end, and once to add
the direction; to remove a direction, once more for the product with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from headway.kernels.residual_edit import Form
from headway.kernels.triton.specialisation import Specialisation

MAX_TILE = 8192  # values of the probe's weights that a program holds at a time
MAX_BLOCK = 1024  # values of the hidden dimension, likewise
NUM_WARPS = 8

RMS = tl.constexpr(int(Form.RMS))
REMOVE = tl.constexpr(int(Form.REMOVE))


@triton.jit
def residual_edit_kernel(
    hidden_states: tl.tensor,
    residual: tl.tensor,
    row_slots: tl.tensor,
    slot_edits: tl.tensor,
    strengths: tl.tensor,
    slot_forms: tl.tensor,
    probe_weights: tl.tensor,
    probe_bias: tl.tensor,
    directions: tl.tensor,
    hidden_stride: tl.tensor,
    residual_stride: tl.tensor,
    weights_edit_stride: tl.tensor,
    weights_cluster_stride: tl.tensor,
    bias_stride: tl.tensor,
    directions_edit_stride: tl.tensor,
    directions_cluster_stride: tl.tensor,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_CLUSTERS: tl.constexpr,
    CLUSTERS_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    edit = tl.load(slot_edits + slot).to(tl.int64)
    if edit < 0:
        return
    strength = tl.load(strengths + slot)
    if strength == 0.0:
        return

    form = tl.load(slot_forms + slot)

    # -inf beyond the last cluster, and where one is not used: its weights are not even read.
    cluster = tl.arange(0, CLUSTERS_BLOCK)
    bias = tl.load(
        probe_bias + edit * bias_stride + cluster,
        mask=cluster < NUM_CLUSTERS,
        other=float("-inf"),
    )
    used = bias > float("-inf")
    weights = probe_weights + edit * weights_edit_stride
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    products = tl.zeros([CLUSTERS_BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < HIDDEN_SIZE
        place = hidden_states + row * hidden_stride + column
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            place = residual + row * residual_stride + column
            x += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        squares += x * x
        place = weights + cluster[:, None] * weights_cluster_stride + column[None, :]
        w = tl.load(place, mask=used[:, None] & inside[None, :], other=0.0)
        products += w.to(tl.float32) * x[None, :]
    rms = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), HIDDEN_SIZE * 1.0))
    if (rms == 0.0) & (form == RMS):
        return

    # -inf also instead of the NaN that a row of infinities gives: whatever the row holds, the
    # cluster chosen must be one that exists. Of a row of zeros the probe reads zeros.
    inverse = tl.where(rms > 0.0, 1.0 / tl.where(rms > 0.0, rms, 1.0), 0.0)
    logits = tl.sum(products, axis=1) * inverse + bias
    logits = tl.where(logits == logits, logits, float("-inf"))
    chosen = tl.argmax(logits, axis=0, tie_break_left=True)

    direction = directions + edit * directions_edit_stride + chosen * directions_cluster_stride
    amount = strength
    if form == RMS:
        amount = strength * rms
    elif form == REMOVE:
        along = tl.zeros([BLOCK], dtype=tl.float32)
        square = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN_SIZE, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < HIDDEN_SIZE
            place = hidden_states + row * hidden_stride + column
            x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            if residual is not None:
                place = residual + row * residual_stride + column
                x += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(direction + column, mask=inside, other=0.0).to(tl.float32)
            along += x * v
            square += v * v
        length = tl.sum(square, axis=0)
        if length == 0.0:
            return
        amount = -strength * tl.sum(along, axis=0) / length
    for start in range(0, HIDDEN_SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < HIDDEN_SIZE
        place = hidden_states + row * hidden_stride + column
        before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(direction + column, mask=inside, other=0.0).to(tl.float32)
        edited = before + amount * v
        tl.store(place, edited.to(hidden_states.dtype.element_ty), mask=inside)


def residual_edit_(
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    row_slots: torch.Tensor,
    slot_edits: torch.Tensor,
    strengths: torch.Tensor,
    slot_forms: torch.Tensor,
    probe_weights: torch.Tensor,
    probe_bias: torch.Tensor,
    directions: torch.Tensor,
) -> None:
    """Add to each row the direction that its edit's probe picks; rows without an edit keep bits.

    hidden_states: [num_tokens, hidden_size], float32, bfloat16 or float16, edited in place;
    residual: the same or None, only read. The probe reads their sum, in float32.
    row_slots: int32 [>= num_tokens], the slot of a row, -1 for none. slot_edits: int32 [capacity],
    the edit of a slot, -1 for none; strengths: float32 [capacity], of a slot, 0 leaves the row
    alone; slot_forms: int32 [capacity], its `Form`.
    probe_weights, directions: [num_edits, num_clusters, hidden_size], float32 or bfloat16.
    probe_bias: float32 [num_edits, num_clusters], -inf for a cluster that is not used.

    The last stride of all of them is 1. Raises ValueError if the shapes do not fit.
    """
    num_tokens, hidden_size = hidden_states.shape
    streams = [hidden_states] if residual is None else [hidden_states, residual]
    if any(stream.shape != hidden_states.shape or stream.stride(1) != 1 for stream in streams):
        raise ValueError("hidden_states and residual must have one shape and last stride 1")
    if row_slots.shape[0] < num_tokens:
        raise ValueError(f"row_slots must hold {num_tokens} rows")
    if probe_weights.shape != directions.shape or directions.shape[2] != hidden_size:
        raise ValueError(
            f"probe_weights {tuple(probe_weights.shape)} and directions "
            f"{tuple(directions.shape)} must be [num_edits, num_clusters, {hidden_size}]"
        )
    if num_tokens == 0 or directions.shape[0] == 0:
        return
    num_clusters = directions.shape[1]
    residual_edit_kernel[(num_tokens,)](
        hidden_states,
        residual,
        row_slots,
        slot_edits,
        strengths,
        slot_forms,
        probe_weights,
        probe_bias,
        directions,
        hidden_states.stride(0),
        0 if residual is None else residual.stride(0),
        probe_weights.stride(0),
        probe_weights.stride(1),
        probe_bias.stride(0),
        directions.stride(0),
        directions.stride(1),
        **_constants(hidden_size, num_clusters),
        num_warps=NUM_WARPS,
    )


def _constants(hidden_size: int, num_clusters: int) -> dict[str, int]:
    clusters_block = triton.next_power_of_2(num_clusters)
    block = min(MAX_BLOCK, MAX_TILE // clusters_block, triton.next_power_of_2(hidden_size))
    return {
        "HIDDEN_SIZE": hidden_size,
        "BLOCK": block,
        "NUM_CLUSTERS": num_clusters,
        "CLUSTERS_BLOCK": clusters_block,
    }


def specialisations() -> Iterator[Specialisation]:
    """Every dtype and hidden size, with float32 tables, and with bfloat16 ones for bfloat16."""
    for dtype, table in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32")):
        for hidden_size in (576, 4096, 8192):
            signature = {
                "hidden_states": f"*{dtype}",
                "residual": f"*{dtype}",
                "row_slots": "*i32",
                "slot_edits": "*i32",
                "strengths": "*fp32",
                "slot_forms": "*i32",
                "probe_weights": f"*{table}",
                "probe_bias": "*fp32",
                "directions": f"*{table}",
                "hidden_stride": "i32",
                "residual_stride": "i32",
                "weights_edit_stride": "i32",
                "weights_cluster_stride": "i32",
                "bias_stride": "i32",
                "directions_edit_stride": "i32",
                "directions_cluster_stride": "i32",
            }
            yield Specialisation(
                kernel="residual_edit",
                name=f"{dtype}-{hidden_size}-{table}-tables",
                function=residual_edit_kernel,
                signature=signature,
                constants=_constants(hidden_size, num_clusters=5),
                aligned=tuple(name for name in signature if name != "bias_stride"),
                num_warps=NUM_WARPS,
                dtype=dtype,
            )
