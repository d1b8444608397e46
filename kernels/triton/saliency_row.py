"""Saliency rows on the GPU, from the paged KV cache and for all candidates at once.

The formula is that of `headway.kernels.saliency_row`. Two launches: the first finds the logsumexp
of every (sequence, head), the second takes a tile of keys, rebuilds its attention weights and sums
over the heads. The tile's keys and values are read once for all candidates and for all query
heads that share them. Sums are float32 products, not tensor-core ones: a handful of rows would
fill a tensor core's tile mostly with padding, and at a smaller precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from headway.kernels.triton.specialisation import Specialisation

# Floats of the cache that a program holds at a time, and so keys. The first kernel walks over all
# keys of a sequence, and wants long steps; the second has a program per tile, and wants many. The
# warps are those found that do not spill registers on sm_80 and sm_90; `aot` checks it.
LSE_TILE = 8192
LSE_WARPS = 8
SALIENCY_TILE = 2048
SALIENCY_WARPS = 2


@triton.jit
def cache_offsets(
    blocks: tl.tensor,
    position: tl.tensor,
    inside: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """int64 [TILE]: where a sequence's positions start in the cache, for KV head 0."""
    block = tl.load(blocks + position // BLOCK_SIZE, mask=inside, other=0)
    return block.to(tl.int64) * block_stride + (position % BLOCK_SIZE).to(tl.int64) * slot_stride


@triton.jit
def lse_kernel(
    lse: tl.tensor,
    query: tl.tensor,
    kv_cache: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    softmax_scale: tl.tensor,
    lse_stride: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    kv_block_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    kv_slot_stride: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens + sequence)
    if seq_len <= 0:
        return
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_SIZE
    place = query + sequence * query_stride + head * query_head_stride + column
    q = tl.load(place, mask=in_head, other=0.0).to(tl.float32) * softmax_scale
    blocks = block_table + sequence * table_stride
    cache = kv_cache + head // GROUP * kv_head_stride
    peak = float("-inf")
    total = 0.0
    for start in range(0, seq_len, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < seq_len
        offset = cache_offsets(
            blocks, position, inside, kv_block_stride, kv_slot_stride, BLOCK_SIZE
        )
        keys = cache + offset[:, None] + column[None, :]
        readable = inside[:, None] & in_head[None, :]
        k = tl.load(keys, mask=readable, other=0.0).to(tl.float32)
        logits = tl.where(inside, tl.sum(k * q[None, :], axis=1), float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        peak = higher
    tl.store(lse + sequence * lse_stride + head, peak + tl.log(total))


@triton.jit(do_not_specialize=["max_len"])
def saliency_kernel(
    saliency: tl.tensor,
    lse: tl.tensor,
    query: tl.tensor,
    grad_output: tl.tensor,
    kv_cache: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    softmax_scale: tl.tensor,
    max_len: tl.tensor,
    saliency_stride: tl.tensor,
    saliency_candidate_stride: tl.tensor,
    lse_stride: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    grad_stride: tl.tensor,
    grad_candidate_stride: tl.tensor,
    grad_head_stride: tl.tensor,
    kv_block_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    kv_slot_stride: tl.tensor,
    table_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
    CANDIDATES_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    seq_len = tl.load(seq_lens + sequence)
    position = start + tl.arange(0, TILE)
    candidate = tl.arange(0, CANDIDATES_BLOCK)
    place = saliency + sequence * saliency_stride + position[None, :]
    place += candidate[:, None] * saliency_candidate_stride
    written = (candidate < NUM_CANDIDATES)[:, None] & (position < max_len)[None, :]
    sums = tl.zeros([CANDIDATES_BLOCK, TILE], dtype=tl.float32)
    if start >= seq_len:
        tl.store(place, sums, mask=written)
        return

    inside = position < seq_len
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_SIZE
    readable = inside[:, None] & in_head[None, :]
    blocks = block_table + sequence * table_stride
    offset = cache_offsets(blocks, position, inside, kv_block_stride, kv_slot_stride, BLOCK_SIZE)
    cache = kv_cache
    for kv_head in range(NUM_KV_HEADS):
        keys = cache + offset[:, None] + column[None, :]
        k = tl.load(keys, mask=readable, other=0.0).to(tl.float32)
        v = tl.load(keys + HEAD_SIZE, mask=readable, other=0.0).to(tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q = tl.load(
                query + sequence * query_stride + head * query_head_stride + column,
                mask=in_head,
                other=0.0,
            ).to(tl.float32)
            logits = tl.sum(k * (q * softmax_scale)[None, :], axis=1)
            weights = tl.exp(logits - tl.load(lse + sequence * lse_stride + head))
            grads = grad_output + sequence * grad_stride + head * grad_head_stride + column
            for c in range(NUM_CANDIDATES):
                grad = tl.load(grads + c * grad_candidate_stride, mask=in_head, other=0.0)
                through = tl.sum(v * grad.to(tl.float32)[None, :], axis=1)
                row = tl.abs(weights * through)[None, :]
                sums += tl.where((candidate == c)[:, None], row, 0.0)
        cache += kv_head_stride
    tl.store(place, tl.where(inside[None, :], sums, 0.0), mask=written)


def saliency_rows(
    saliency: torch.Tensor,
    query: torch.Tensor,
    grad_output: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    lse: torch.Tensor,
) -> None:
    """Write the saliency rows of B sequences with one query token each, the last of each.

    saliency: float32 [B, num_candidates, max_len], written; 0 from the sequence's length on.
    query: [B, num_heads, head_size], float32, bfloat16 or float16.
    grad_output: [B, num_candidates, num_heads, head_size], float32 or query's dtype.
    kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], a key and then its value in the
    last dim; vLLM's layouts HND and NHD differ in the strides, of which only the last must be 1.
    block_table: int32 [B, max_blocks]. seq_lens: int32 [B], keys of a sequence, at most max_len;
    0 for padding. The query attends to all of them: no sliding window, no soft cap.
    lse: float32 [B, num_heads], workspace, left holding the logsumexp of the scaled logits.

    Raises ValueError if the shapes do not fit.
    """
    batch, num_candidates, max_len = saliency.shape
    _, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, key_value_size = kv_cache.shape
    if grad_output.shape != (batch, num_candidates, num_heads, head_size):
        raise ValueError(f"grad_output {tuple(grad_output.shape)} does not fit saliency and query")
    if key_value_size != 2 * head_size or num_heads % num_kv_heads:
        raise ValueError(f"kv_cache {tuple(kv_cache.shape)} does not fit {num_heads} heads")
    if saliency.numel() == 0:
        return
    where = (kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0))
    constants = _constants(num_heads // num_kv_heads, head_size, block_size)
    tile = _tile(SALIENCY_TILE, head_size)
    lse_kernel[(batch, num_heads)](
        lse,
        query,
        kv_cache,
        block_table,
        seq_lens,
        float(softmax_scale),
        lse.stride(0),
        query.stride(0),
        query.stride(1),
        *where,
        **constants,
        TILE=_tile(LSE_TILE, head_size),
        num_warps=LSE_WARPS,
    )
    saliency_kernel[(batch, triton.cdiv(max_len, tile))](
        saliency,
        lse,
        query,
        grad_output,
        kv_cache,
        block_table,
        seq_lens,
        float(softmax_scale),
        max_len,
        saliency.stride(0),
        saliency.stride(1),
        lse.stride(0),
        query.stride(0),
        query.stride(1),
        grad_output.stride(0),
        grad_output.stride(1),
        grad_output.stride(2),
        *where,
        **constants,
        TILE=tile,
        NUM_KV_HEADS=num_kv_heads,
        NUM_CANDIDATES=num_candidates,
        CANDIDATES_BLOCK=triton.next_power_of_2(num_candidates),
        num_warps=SALIENCY_WARPS,
    )


def _constants(group: int, head_size: int, block_size: int) -> dict[str, int]:
    return {
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "HEAD_BLOCK": triton.next_power_of_2(head_size),
        "BLOCK_SIZE": block_size,
    }


def _tile(floats: int, head_size: int) -> int:
    """How many keys make a tile of so many floats: a power of 2, at least 1."""
    return max(1, floats // triton.next_power_of_2(head_size))


def specialisations() -> Iterator[Specialisation]:
    """Both kernels for every dtype and head size, with 5 candidates and 4 heads to a KV head."""
    types = {
        "saliency": "*fp32",
        "lse": "*fp32",
        "grad_output": "*fp32",
        "block_table": "*i32",
        "seq_lens": "*i32",
        "softmax_scale": "fp32",
    }
    unaligned = {"softmax_scale", "max_len", "saliency_candidate_stride", "table_stride"}
    sizes = {"NUM_KV_HEADS": 8, "NUM_CANDIDATES": 5, "CANDIDATES_BLOCK": 8}
    kernels = (
        ("lse", lse_kernel, LSE_TILE, LSE_WARPS),
        ("saliency", saliency_kernel, SALIENCY_TILE, SALIENCY_WARPS),
    )
    for dtype in ("bf16", "fp16", "fp32"):
        for head_size in (64, 80, 96, 128, 256):
            for part, function, floats, num_warps in kernels:
                constants = sizes | _constants(group=4, head_size=head_size, block_size=16)
                constants["TILE"] = _tile(floats, head_size)
                arguments = [name for name in function.arg_names if name not in constants]
                signature = {name: types.get(name, "i32") for name in arguments}
                signature["query"] = signature["kv_cache"] = f"*{dtype}"
                yield Specialisation(
                    kernel="saliency_row",
                    name=f"{part}-{dtype}-{head_size}",
                    function=function,
                    signature=signature,
                    constants={n: v for n, v in constants.items() if n in function.arg_names},
                    aligned=tuple(name for name in arguments if name not in unaligned),
                    num_warps=num_warps,
                    head_size=head_size,
                    dtype=dtype,
                )
