"""Launches of the segment attention kernel to time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from headway.benchmarks.kernels import model
from headway.benchmarks.kernels.device import Case
from headway.kernels.head_word import Field, Tag
from headway.kernels.triton.segment_attention import (
    Rows,
    Workspace,
    segment_attention,
    splits_of,
)
from headway.kernels.triton.segment_finish import NUM_READINGS

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
SINKS = 4
IMAGE_SHARE = 0.6
"""Part of a prompt that its image takes, from the first token after the sinks on."""


@dataclass(frozen=True)
class Load:
    """Requests of `query_len` rows that end a sequence of `seq_len` keys."""

    num_reqs: int
    query_len: int
    seq_len: int

    def __str__(self) -> str:
        if self.query_len == 1:
            return f"decode, {self.num_reqs} x {self.seq_len}"
        return f"prompt chunk of {self.query_len}"


LOADS = (
    Load(16, 1, 512),
    Load(16, 1, 4096),
    Load(1, 1, 4096),
    Load(1, 1, 32768),
    Load(1, 2048, 2048),
)


def cases(
    loads: Sequence[Load] = LOADS, device: str = "cuda", num_sms: int | None = None
) -> Iterator[Case]:
    """Every load with VAR's words and with words that edit logits alone; the first also unsteered.

    That one is what a launch captured in a CUDA graph costs when nobody steers.

    num_sms: of the device, which is asked if it is not given.
    """
    if num_sms is None:
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    for load in loads:
        splits = splits_of(load.num_reqs, KV_HEADS, load.seq_len, num_sms)
        num_splits = splits if load.query_len == 1 else 1
        for moves in (True, False):
            case = f"{load}{model.parts(num_splits)}, {model.EDITS[moves]}"
            shape = load.num_reqs, load.query_len, load.seq_len, HEADS, KV_HEADS, HEAD_SIZE
            work = model.segment_attention(case, *shape, num_splits=num_splits, moves=moves)
            yield Case(work, _launch(load, num_splits, moves, device, steered=True))
    load = loads[0]
    rows = load.num_reqs * load.query_len
    work = model.Work("segment_attention", f"{load}, none steered", read=4 * rows, written=0)
    yield Case(work, _launch(load, 1, True, device, steered=False))


def words_of(num_reqs: int, moves: bool, device: str) -> torch.Tensor:
    """float32 [num_reqs, HEADS, len(Field)]: VAR's, or a bias on the image within a window."""
    words = torch.zeros(num_reqs, HEADS, len(Field), device=device)
    words[..., [Field.GAMMA, Field.GAIN_B, Field.SCALE]] = 1.0
    words[..., Field.SHIFT_INDEX] = -1.0
    words[..., Field.REQUIRE_B] = float(Tag.IMAGE)
    if moves:
        words[..., Field.MOVED_SHARE] = 0.6
        words[..., Field.MIN_IMAGE_MASS] = 0.2
        words[..., Field.MIN_SHARE_B] = 0.5
        words[..., Field.REQUIRE_A] = float(Tag.SINK)
        words[..., Field.EXCLUDE_B] = float(Tag.SINK)
    else:
        words[..., Field.BIAS_B] = math.log(1.15)
        words[..., Field.WINDOW_B] = 256.0
    return words


def _launch(load: Load, num_splits: int, moves: bool, device: str, steered: bool) -> partial[None]:
    """A launch in vLLM's layout NHD, on shuffled blocks; every row has a word, or none has."""
    num_reqs, num_tokens = load.num_reqs, load.num_reqs * load.query_len
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    blocks = -(-load.seq_len // BLOCK_SIZE)
    query = torch.randn(num_tokens, HEADS, HEAD_SIZE, device=device).to(torch.bfloat16)
    shape = num_reqs * blocks, BLOCK_SIZE, KV_HEADS, 2 * HEAD_SIZE
    kv_cache = torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(1, 2)
    block_table = torch.randperm(num_reqs * blocks, device=device).to(torch.int32)
    tags = torch.zeros(num_reqs, load.seq_len, dtype=torch.uint8, device=device)
    tags[:, SINKS : int(IMAGE_SHARE * load.seq_len)] = int(Tag.IMAGE)
    slot_tags = torch.zeros(num_reqs * blocks * BLOCK_SIZE, dtype=torch.uint8, device=device)
    first_slots = block_table.view(num_reqs, blocks)[:, :1].long() * BLOCK_SIZE
    slot_tags[first_slots + torch.arange(SINKS, device=device)] = int(Tag.SINK)
    each = torch.arange(num_reqs, **int32)
    row_slots = each.repeat_interleave(load.query_len)
    rows = Rows(
        query_start_loc=torch.arange(num_reqs + 1, **int32) * load.query_len,
        seq_lens=torch.full((num_reqs,), load.seq_len, **int32),
        row_slots=row_slots if steered else torch.full_like(row_slots, -1),
        prompt_lens=torch.full((num_reqs,), load.seq_len, **int32),
        tag_rows=each,
        reading_rows=torch.full((num_reqs,), -1, **int32),
        max_query_len=load.query_len,
    )
    return partial(
        segment_attention,
        query,
        kv_cache,
        torch.empty_like(query),
        block_table.view(num_reqs, blocks),
        rows,
        words_of(num_reqs, moves, device),
        torch.ones(num_reqs, HEADS, dtype=torch.uint8, device=device),
        HEAD_SIZE**-0.5,
        tags=tags,
        slot_tags=slot_tags,
        readings=torch.zeros(1, HEADS, NUM_READINGS, device=device),
        workspace=Workspace(num_reqs, HEADS, HEAD_SIZE, device) if num_splits > 1 else None,
        num_splits=num_splits,
        moves=moves,
    )
