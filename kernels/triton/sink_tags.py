"""Sink tags on the GPU: find the sinks among a layer's rows and store them beside the KV cache.

The rule is that of `headway.kernels.sink_tags`. One program decides one row and writes one byte
under the row's cache slot, where the tag lives as long as the slot's keys and values do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from headway.kernels.head_word import Tag
from headway.kernels.triton.specialisation import Specialisation

SINK = tl.constexpr(int(Tag.SINK))

MAX_BLOCK = 2048  # values of the hidden dimension that a program holds at a time
NUM_WARPS = 4


@triton.jit
def sink_tags_kernel(
    slot_tags: tl.tensor,
    hidden_states: tl.tensor,
    residual: tl.tensor,
    slot_mapping: tl.tensor,
    row_rules: tl.tensor,
    rule_tau: tl.tensor,
    rule_dims: tl.tensor,
    hidden_stride: tl.tensor,
    residual_stride: tl.tensor,
    dims_stride: tl.tensor,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_DIMS: tl.constexpr,
    DIMS_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    rule = tl.load(row_rules + row)
    if rule < 0:
        return
    tau = tl.load(rule_tau + rule)
    if tau < 0.0:
        return
    slot = tl.load(slot_mapping + row)
    if slot < 0:
        return

    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, HIDDEN_SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < HIDDEN_SIZE
        place = hidden_states + row * hidden_stride + column
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            place = residual + row * residual_stride + column
            x += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        total += x * x
    # Correctly rounded: the approximations that a GPU takes by default may move a row over tau.
    rms = tl.sqrt_rn(tl.div_rn(tl.sum(total, axis=0), HIDDEN_SIZE * 1.0))

    entry = tl.arange(0, DIMS_BLOCK)
    dims = tl.load(
        rule_dims + rule.to(tl.int64) * dims_stride + entry, mask=entry < MAX_DIMS, other=-1
    )
    used = dims >= 0
    peak = tl.load(hidden_states + row * hidden_stride + dims, mask=used, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + row * residual_stride + dims
        peak += tl.load(place, mask=used, other=0.0).to(tl.float32)
    sinks = used & (tl.abs(peak) >= tau * rms)
    tag = tl.max(tl.where(sinks, SINK, 0), axis=0)
    tl.store(slot_tags + slot, tag.to(tl.uint8))


def tag_sinks_(
    slot_tags: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    row_rules: torch.Tensor,
    rule_tau: torch.Tensor,
    rule_dims: torch.Tensor,
) -> None:
    """Write Tag.SINK or 0 under the cache slot of every row that a rule decides.

    slot_tags: uint8 [num_cache_slots], the tags of one layer; no other slot is written.
    hidden_states: [num_tokens, hidden_size], float32, bfloat16 or float16, last stride 1;
    residual: the same or None. The stream is their sum, in float32.
    slot_mapping: int64 [>= num_tokens], the cache slot of a row, -1 for padding.
    row_rules: int32 [>= num_tokens], the rule that decides a row, -1 for a row without one.
    rule_tau: float32 [num_rules], in units of the row's RMS; < 0 where the rule does not apply.
    rule_dims: int32 [num_rules, max_dims], the rule's dims, -1 for an unused entry.

    Raises ValueError if the shapes do not fit.
    """
    num_tokens, hidden_size = hidden_states.shape
    streams = [hidden_states] if residual is None else [hidden_states, residual]
    if any(stream.shape != hidden_states.shape or stream.stride(1) != 1 for stream in streams):
        raise ValueError("hidden_states and residual must have one shape and last stride 1")
    if min(slot_mapping.shape[0], row_rules.shape[0]) < num_tokens:
        raise ValueError(f"slot_mapping and row_rules must hold {num_tokens} rows")
    if num_tokens == 0:
        return
    max_dims = rule_dims.shape[1]
    sink_tags_kernel[(num_tokens,)](
        slot_tags,
        hidden_states,
        residual,
        slot_mapping,
        row_rules,
        rule_tau,
        rule_dims,
        hidden_states.stride(0),
        0 if residual is None else residual.stride(0),
        rule_dims.stride(0),
        HIDDEN_SIZE=hidden_size,
        BLOCK=min(MAX_BLOCK, triton.next_power_of_2(hidden_size)),
        MAX_DIMS=max_dims,
        DIMS_BLOCK=triton.next_power_of_2(max_dims),
        num_warps=NUM_WARPS,
    )


def specialisations() -> Iterator[Specialisation]:
    """Every dtype and hidden size, with the residual apart and, as before layer 0, without."""
    for dtype in ("bf16", "fp16", "fp32"):
        for hidden_size in (576, 4096, 8192):
            for with_residual in (False, True):
                signature = {
                    "slot_tags": "*u8",
                    "hidden_states": f"*{dtype}",
                    "residual": f"*{dtype}",
                    "slot_mapping": "*i64",
                    "row_rules": "*i32",
                    "rule_tau": "*fp32",
                    "rule_dims": "*i32",
                    "hidden_stride": "i32",
                    "residual_stride": "i32",
                    "dims_stride": "i32",
                }
                constants = {
                    "HIDDEN_SIZE": hidden_size,
                    "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(hidden_size)),
                    "MAX_DIMS": 2,
                    "DIMS_BLOCK": 2,
                }
                aligned = [name for name in signature if name != "dims_stride"]
                if not with_residual:
                    del signature["residual"]
                    aligned.remove("residual")
                    constants["residual"] = None
                yield Specialisation(
                    kernel="sink_tags",
                    name=f"{dtype}-{hidden_size}" + ("-residual" if with_residual else ""),
                    function=sink_tags_kernel,
                    signature=signature,
                    constants=constants,
                    aligned=tuple(aligned),
                    num_warps=NUM_WARPS,
                    dtype=dtype,
                )
