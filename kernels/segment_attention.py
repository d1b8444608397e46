"""Segment attention: attention with a head word per (row, head), over vLLM's paged CPU cache.

The formula is in `reference.py`, all of it but the affine part, which `head_affine.py` applies
afterwards. The kernel, `segment_attention.c`, is compiled when Headway is installed: it visits
every key and value once, for whichever mixture of decode rows and prompt chunks a step has.

Layout of the cache (vLLM's `vec`): [num_blocks, num_kv_heads, block_size, 2 * head_size], where
the 2 * block_size * head_size numbers of a (block, KV head) are the keys, transposed to
[head_size, block_size], and then the values, [block_size, head_size].
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch

from headway.kernels.compiled import compiled_path
from headway.kernels.head_word import Field, Mass

DTYPES = (torch.float32, torch.bfloat16)
BLOCK_MULTIPLE = 32
HEAD_SIZE_MULTIPLE = 16


class KernelError(RuntimeError):
    """The kernel is not there, or was called with tensors it cannot take."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of a call: int32 vectors, contiguous, one entry per sequence.

    A sequence is a run of rows of one request that share their head words; a request may be
    several.

    first_row: the row of the query tensor where a sequence's rows start. num_rows: how many
    follow. position: of the first of them. prompt_len: keys from there on carry OUTPUT.
    table_row: row of the block table. tag_row: row of `tags`, -1 for none. mass_row: row of
    `masses` that the first of its rows writes, -1 for none.
    """

    first_row: torch.Tensor
    num_rows: torch.Tensor
    position: torch.Tensor
    prompt_len: torch.Tensor
    table_row: torch.Tensor
    tag_row: torch.Tensor
    mass_row: torch.Tensor

    def __post_init__(self) -> None:
        """Raises KernelError for vectors that are not int32, contiguous and of one length."""
        for vector in vars(self).values():
            if (
                vector.dtype is not torch.int32
                or not vector.is_contiguous()
                or vector.shape != self.first_row.shape
            ):
                raise KernelError("sequences must be int32 vectors of one length")


def segment_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    sequences: Sequences,
    words: torch.Tensor,
    softmax_scale: float,
    soft_cap: float = 0.0,
    sliding_window: int = -1,
    tags: torch.Tensor | None = None,
    slot_tags: torch.Tensor | None = None,
    masses: torch.Tensor | None = None,
) -> None:
    """Write the attention of the rows of `sequences` into `output`; other rows are not touched.

    query, output: [num_tokens, num_heads, head_size], float32 or bfloat16; kv_cache: as above,
    same dtype, already holding the keys and values of the rows themselves.
    block_table: int32 [table rows, max blocks]. words: float32 [num_sequences, num_heads, at
    least 18]. soft_cap, sliding_window: none if <= 0. tags: uint8 [tag rows, max length], by
    position. slot_tags: uint8 [num_blocks * block_size], by slot, heeded for keys of the prompt.
    masses: float32 [mass rows, num_heads, len(Mass)], filled with the masses before any gain.

    Raises KernelError if a tensor does not fit; nothing is written then.
    """
    _check(query, kv_cache, output, block_table, sequences, words, tags, slot_tags, masses)
    _, num_kv_heads, block_size, _ = kv_cache.shape
    call = _Call(
        query=query.data_ptr(),
        output=output.data_ptr(),
        kv_cache=kv_cache.data_ptr(),
        block_table=block_table.data_ptr(),
        first_row=sequences.first_row.data_ptr(),
        num_rows=sequences.num_rows.data_ptr(),
        position=sequences.position.data_ptr(),
        prompt_len=sequences.prompt_len.data_ptr(),
        table_row=sequences.table_row.data_ptr(),
        tag_row=sequences.tag_row.data_ptr(),
        mass_row=sequences.mass_row.data_ptr(),
        tags=None if tags is None else tags.data_ptr(),
        slot_tags=None if slot_tags is None else slot_tags.data_ptr(),
        words=words.data_ptr(),
        masses=None if masses is None else masses.data_ptr(),
        query_stride=query.stride(0),
        output_stride=output.stride(0),
        block_stride=kv_cache.stride(0),
        kv_head_stride=kv_cache.stride(1),
        block_table_stride=block_table.stride(0),
        tags_stride=0 if tags is None else tags.stride(0),
        words_stride=words.stride(1),
        num_sequences=len(sequences.first_row),
        num_heads=query.shape[1],
        num_kv_heads=num_kv_heads,
        head_size=query.shape[2],
        block_size=block_size,
        sliding_window=sliding_window,
        softmax_scale=softmax_scale,
        soft_cap=soft_cap,
        is_bfloat16=query.dtype is torch.bfloat16,
    )
    if library().headway_segment_attention(ctypes.byref(call)):
        raise KernelError("no memory for the segment attention kernel")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises KernelError if it was not built with this installation."""
    path = library_path()
    if path is None:
        message = (
            "the CPU attention kernel is not built; install Headway where there is a C compiler"
        )
        raise KernelError(message)
    return ctypes.CDLL(path)


def library_path() -> str | None:
    """Where the compiled kernel is, None if it was not built with this installation."""
    return compiled_path("segment_attention")


def _check(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    sequences: Sequences,
    words: torch.Tensor,
    tags: torch.Tensor | None,
    slot_tags: torch.Tensor | None,
    masses: torch.Tensor | None,
) -> None:
    # Called for every layer of every step: plain comparisons, no text made in advance.
    _, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, width = kv_cache.shape
    dense = (head_size, 1)
    if query.dtype not in DTYPES or not query.dtype == output.dtype == kv_cache.dtype:
        raise KernelError("query, output and cache must be of one dtype, float32 or bfloat16")
    if output.shape != query.shape:
        raise KernelError("output must be shaped as query")
    if query.stride()[1:] != dense or output.stride()[1:] != dense:
        raise KernelError("heads must be laid out densely")
    if kv_cache.stride()[2:] != (width, 1) or width != 2 * head_size:
        raise KernelError("the cache must be made of dense blocks of keys and values")
    if block_size % BLOCK_MULTIPLE or head_size % HEAD_SIZE_MULTIPLE or num_heads % num_kv_heads:
        raise KernelError(
            f"block size, head size and query heads must be multiples of {BLOCK_MULTIPLE}, "
            f"{HEAD_SIZE_MULTIPLE} and the KV heads; got {block_size}, {head_size}, {num_heads}"
        )
    if block_table.dtype is not torch.int32 or block_table.stride(1) != 1:
        raise KernelError("the block table must be int32")
    if (
        words.dtype is not torch.float32
        or not words.is_contiguous()
        or words.shape[:2] != (len(sequences.first_row), num_heads)
        or words.shape[2] < Field.SCALE
    ):
        raise KernelError("words must be float32, for every head of every sequence")
    for tensor in (tags, slot_tags):
        if tensor is not None and (tensor.dtype is not torch.uint8 or tensor.stride(-1) != 1):
            raise KernelError("tags must be uint8")
    if masses is not None and (
        masses.shape[1:] != (num_heads, len(Mass)) or not masses.is_contiguous()
    ):
        raise KernelError("masses must be of every head of a row")


_POINTERS = (
    "query",
    "output",
    "kv_cache",
    "block_table",
    "first_row",
    "num_rows",
    "position",
    "prompt_len",
    "table_row",
    "tag_row",
    "mass_row",
    "tags",
    "slot_tags",
    "words",
    "masses",
)
_STRIDES = (
    "query_stride",
    "output_stride",
    "block_stride",
    "kv_head_stride",
    "block_table_stride",
    "tags_stride",
    "words_stride",
)
_SIZES = (
    "num_sequences",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "block_size",
    "sliding_window",
)


class _Call(ctypes.Structure):
    """`struct call` of segment_attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in _SIZES),
        ("softmax_scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("is_bfloat16", ctypes.c_int32),
    )
