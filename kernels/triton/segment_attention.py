"""Segment attention on the GPU: attention with a head word per (row, head), in one pass.

The formula is in `../reference.py`, all of it but the affine part. Whether a row's condition holds
and the gain of class B are known only when all keys were seen; the gain of class A, 1 - p, is known
before. So there are three accumulators: of all keys, which is the answer if the condition fails, of
the keys outside of B and of those within, and every key and value is read once, whatever mass moves
where. Long sequences are divided among programs, joined by `reduce_splits`.

The cache is vLLM's on GPU: logically [num_blocks, num_kv_heads, block_size, 2 * head_size], a key
and its value side by side; any strides (NHD and HND), the last dimension dense.

Everything a launch depends on, apart from shapes, is read on the device: the same launch, captured
in a CUDA graph, serves whatever the tables hold when it is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from headway.kernels.head_word import Field
from headway.kernels.triton.segment_finish import NUM_STATS, reduce_splits
from headway.kernels.triton.segment_kernel import segment_kernel
from headway.kernels.triton.specialisation import Specialisation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SPLITS = 16
FIELDS = len(Field)


@dataclass(frozen=True)
class Rows:
    """Which rows are edited and how they lie in the batch; tensors on the device.

    query_start_loc: int32 [num_reqs + 1], ascending; seq_lens: int32 [num_reqs], the rows of this
    step included. A request without rows is padding.
    row_slots: int32 [>= num_tokens], row of `words` and `edits` of each row, -1 for none.
    prompt_lens: int32 [>= num_reqs], keys from there on carry OUTPUT. tag_rows: int32, row of
    `tags`, -1 for none. reading_rows: int32, row of `readings`, -1 for none.
    max_query_len: most rows of a request, on the host.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    row_slots: torch.Tensor
    prompt_lens: torch.Tensor
    tag_rows: torch.Tensor
    reading_rows: torch.Tensor
    max_query_len: int


class Workspace:
    """Where programs that share a sequence leave their part: allocated once.

    For decode steps of up to max_reqs requests.
    """

    def __init__(
        self, max_reqs: int, num_heads: int, head_size: int, device: torch.device | str
    ) -> None:
        self.max_reqs = max_reqs
        width = 3 * triton.next_power_of_2(head_size)
        shape = max_reqs, num_heads, MAX_SPLITS
        self.partial = torch.empty(*shape, width, dtype=torch.float32, device=device)
        self.stats = torch.empty(*shape, NUM_STATS, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut: BLOCK_M (row, head) pairs by BLOCK_N keys to a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles_of(head_size: int, group: int, dtype: torch.dtype, one_row: bool, moves: bool) -> Tiles:
    """The largest tiles found that do not spill registers on sm_80 and sm_90; `aot` checks it."""
    pad = triton.next_power_of_2(head_size)
    block_m = 16 if one_row or moves else 64 if pad <= 64 else 32
    half = dtype is not torch.float32
    block_n = 64 if one_row and pad <= 64 and half else 32
    num_warps = 8 if pad > 128 or (pad > 64 and not half) else 4
    num_stages = 3 if one_row and not moves and pad <= 128 else 2
    return Tiles(max(block_m, triton.next_power_of_2(group)), block_n, num_warps, num_stages)


def splits_of(num_reqs: int, num_kv_heads: int, max_seq_len: int, num_sms: int) -> int:
    """Into how many parts a decode step divides its sequences: enough programs for two waves.

    A power of two; 1 where the batch fills the device, or the sequences are short.
    """
    wanted = min(2 * num_sms // max(num_reqs * num_kv_heads, 1), max_seq_len // 256, MAX_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


def segment_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    rows: Rows,
    words: torch.Tensor,
    edits: torch.Tensor,
    softmax_scale: float,
    soft_cap: float = 0.0,
    sliding_window: int = -1,
    tags: torch.Tensor | None = None,
    slot_tags: torch.Tensor | None = None,
    readings: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    num_splits: int = 1,
    moves: bool = True,
) -> None:
    """Write the attention of edited (row, head) pairs into `output`; no other pair is touched.

    query, output: [num_tokens, num_heads, head_size], float32, bfloat16 or float16; kv_cache: as
    above, same dtype, already holding the keys and values of the rows themselves.
    block_table: int32 [num_reqs, max blocks]. words: float32 [capacity, num_heads, len(Field)];
    edits: uint8 [capacity, num_heads], where a word edits attention. soft_cap, sliding_window:
    none if <= 0. tags: uint8 [tag rows, max length], by position. slot_tags: uint8 [num_blocks *
    block_size], by cache slot, heeded for keys of the prompt. readings: float32 [reading rows,
    num_heads, 8]: to the first three columns the masses of A, B and image of output rows are
    added, to the fourth 1 for every row whose condition held; the next three get the masses of the
    last row.
    num_splits: parts of a sequence, a power of two, for steps of one row a request; above 1 it
    needs the workspace. moves: False if no word has a gain, a condition or moves mass, and nothing
    is read: one accumulator then does.

    Raises ValueError for tensors that do not fit.
    """
    _check(query, kv_cache, output, words, edits)
    num_tokens, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    num_reqs = len(rows.query_start_loc) - 1
    group = num_heads // num_kv_heads
    one_row = rows.max_query_len == 1
    tiles = tiles_of(head_size, group, query.dtype, one_row, moves)
    block_q = tiles.block_m // group
    if num_splits > 1 and not (one_row and workspace and num_reqs <= workspace.max_reqs):
        raise ValueError("splits are for one row a request, within the workspace")
    partial, stats = (workspace.partial, workspace.stats) if workspace else (None, None)
    sizes = {
        "NUM_HEADS": num_heads,
        "GROUP": group,
        "FIELDS": words.shape[2],
        "HEAD_SIZE": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "BLOCK_SIZE": block_size,
        "NUM_SPLITS": num_splits,
        "MOVES": moves,
    }
    num_tiles = num_reqs if one_row else num_tokens // block_q + num_reqs
    segment_kernel[num_tiles, num_kv_heads, num_splits](
        query,
        kv_cache,
        output,
        block_table,
        rows.query_start_loc,
        rows.seq_lens,
        rows.row_slots,
        rows.prompt_lens,
        rows.tag_rows,
        rows.reading_rows,
        edits,
        words,
        tags,
        slot_tags,
        readings,
        partial,
        stats,
        softmax_scale,
        soft_cap,
        sliding_window,
        num_reqs,
        query.stride(0),
        output.stride(0),
        *kv_cache.stride()[:3],
        block_table.stride(0),
        edits.stride(0),
        words.stride(0),
        0 if tags is None else tags.stride(0),
        **sizes,
        BLOCK_Q=block_q,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        ONE_TILE=one_row,
        SOFT_CAP=soft_cap > 0,
        SLIDING=sliding_window > 0,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits == 1:
        return
    reduce_splits[num_reqs, num_heads](
        output,
        kv_cache,
        block_table,
        rows.query_start_loc,
        rows.seq_lens,
        rows.row_slots,
        rows.prompt_lens,
        rows.reading_rows,
        edits,
        words,
        readings,
        partial,
        stats,
        output.stride(0),
        *kv_cache.stride()[:3],
        block_table.stride(0),
        edits.stride(0),
        words.stride(0),
        **sizes,
    )


def _check(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    words: torch.Tensor,
    edits: torch.Tensor,
) -> None:
    _, num_heads, head_size = query.shape
    if query.dtype not in DTYPES or not query.dtype == output.dtype == kv_cache.dtype:
        raise ValueError("query, output and cache must be of one dtype: float32, bfloat16, float16")
    if output.shape != query.shape or query.stride()[1:] != output.stride()[1:]:
        raise ValueError("output must be shaped as query")
    if query.stride()[1:] != (head_size, 1):
        raise ValueError("heads must be laid out densely")
    if kv_cache.shape[3] != 2 * head_size or kv_cache.stride(3) != 1:
        raise ValueError("a cache slot must hold a key and its value, side by side")
    if num_heads % kv_cache.shape[1]:
        raise ValueError("query heads must be a multiple of the KV heads")
    if words.dtype is not torch.float32 or words.shape[1:] != (num_heads, FIELDS):
        raise ValueError("words must be float32, for every head")
    if edits.dtype is not torch.uint8 or edits.shape != words.shape[:2]:
        raise ValueError("edits must be uint8, for every head")
    if words.stride()[1:] != (FIELDS, 1) or edits.stride(1) != 1:
        raise ValueError("words and edits must be dense")


_POINTERS = {
    "block_table": "*i32",
    "query_start_loc": "*i32",
    "seq_lens": "*i32",
    "row_slots": "*i32",
    "prompt_lens": "*i32",
    "reading_rows": "*i32",
    "edits": "*u8",
    "words": "*fp32",
    "readings": "*fp32",
    "partial": "*fp32",
    "stats": "*fp32",
}
_STRIDES = (
    "output_stride",
    "block_stride",
    "kv_head_stride",
    "slot_stride",
    "block_table_stride",
    "edits_stride",
    "words_stride",
)


def specialisations() -> Iterator[Specialisation]:
    """Decode whole and divided, and prompt chunks; 32 heads over 8 KV heads, every head size.

    Of decode steps that edit logits only, those divided are described for head size 128 alone.
    """
    for dtype in DTYPES:
        for head_size in (64, 80, 96, 128, 256):
            for one_row, num_splits, moves in (
                (True, 1, True),
                (True, 1, False),
                (True, 8, True),
                (False, 1, True),
                (False, 1, False),
            ):
                yield from _variants(dtype, head_size, one_row, num_splits, moves)
        yield from _variants(dtype, 128, True, num_splits=8, moves=False)


def _variants(
    dtype: torch.dtype, head_size: int, one_row: bool, num_splits: int, moves: bool
) -> Iterator[Specialisation]:
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    group = 4
    tiles = tiles_of(head_size, group, dtype, one_row, moves)
    sizes = {
        "NUM_HEADS": 32,
        "GROUP": group,
        "FIELDS": FIELDS,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "BLOCK_SIZE": 16,
        "NUM_SPLITS": num_splits,
        "MOVES": moves,
    }
    of_dtype = {pointer: f"*{name}" for pointer in ("query", "cache", "output")}
    strides = dict.fromkeys(_STRIDES, "i32")
    own = {"tag_rows": "*i32", "tags": "*u8", "slot_tags": "*u8"}
    pointers = of_dtype | _POINTERS
    what, join = "decode" if one_row else "prompt", "join"
    if not moves:
        what, join = f"{what}, logits only", f"{join}, logits only"
    if num_splits > 1:
        what += ", divided"
    yield Specialisation(
        "segment_attention",
        f"{what} {name} head_size={head_size}",
        segment_kernel,
        pointers
        | own
        | {"softmax_scale": "fp32", "soft_cap": "fp32", "sliding_window": "i32", "num_reqs": "i32"}
        | strides
        | {"query_stride": "i32", "tags_stride": "i32"},
        sizes
        | {
            "BLOCK_Q": tiles.block_m // group,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "ONE_TILE": one_row,
            "SOFT_CAP": False,
            "SLIDING": False,
        },
        (*pointers, *own, *_STRIDES[:4], "query_stride", "tags_stride"),
        tiles.num_warps,
        tiles.num_stages,
        head_size,
        name,
        tensor_cores=dtype is not torch.float32,
    )
    if num_splits > 1:
        reduced = {key: kind for key, kind in pointers.items() if key != "query"}
        yield Specialisation(
            "segment_attention",
            f"{join} {name} head_size={head_size}",
            reduce_splits,
            reduced | strides,
            sizes,
            (*reduced, *_STRIDES[:4]),
            head_size=head_size,
            dtype=name,
        )
