"""The kernel of `segment_attention.py`, which says what it computes and launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.head_word import Tag
from headway.kernels.triton import segment_finish as finish

_IMAGE = tl.constexpr(int(Tag.IMAGE))
_OUTPUT = tl.constexpr(int(Tag.OUTPUT))
_STATS = tl.constexpr(finish.NUM_STATS)
_READINGS = tl.constexpr(finish.NUM_READINGS)


@triton.jit
def _sequence_of(query_start_loc, tile, num_reqs, BLOCK_Q: tl.constexpr):
    """The last request whose first tile is not after `tile`, by bisection.

    Request r starts at tile query_start_loc[r] // BLOCK_Q + r, which leaves room for every
    request's last, incomplete tile.
    """
    low = tl.full([], 0, tl.int32)
    high = low + num_reqs
    while low < high:
        middle = (low + high) // 2
        before = tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low - 1


@triton.jit
def _class_of(word, used, REQUIRE: tl.constexpr, EXCLUDE: tl.constexpr):
    """The tags that a class asks for and those it refuses, in one integer to save registers."""
    require = tl.load(word + REQUIRE, mask=used, other=0.0).to(tl.int32)
    return (require | (tl.load(word + EXCLUDE, mask=used, other=0.0).to(tl.int32) << 8))[:, None]


@triton.jit
def _members(tag, distance, tags, window):
    """Which keys [1, N] are in the class of each row [M, 1]."""
    inside = ((tag & tags & 255) == (tags & 255)) & ((tag & (tags >> 8)) == 0)
    return inside & ((window == 0) | ((distance >= 1) & (distance <= window)))


@triton.jit(do_not_specialize=["num_reqs"])
def segment_kernel(
    query,
    cache,
    output,
    block_table,
    query_start_loc,
    seq_lens,
    row_slots,
    prompt_lens,
    tag_rows,
    reading_rows,
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
    query_stride,
    output_stride,
    block_stride,
    kv_head_stride,
    slot_stride,
    block_table_stride,
    edits_stride,
    words_stride,
    tags_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MOVES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SLIDING: tl.constexpr,
):
    """A program: BLOCK_Q rows of a request, the heads of one KV head, a part of the keys."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if ONE_TILE:
        sequence = tile
        first_row = 0
        start = tl.load(query_start_loc + sequence)
    else:
        sequence = _sequence_of(query_start_loc, tile, num_reqs, BLOCK_Q)
        start = tl.load(query_start_loc + sequence)
        first_row = (tile - start // BLOCK_Q - sequence) * BLOCK_Q
    count = tl.load(query_start_loc + sequence + 1) - start
    if first_row >= count:
        return
    m = tl.arange(0, BLOCK_M)
    row = first_row + m // GROUP
    head = kv_head * GROUP + m % GROUP
    slot = tl.load(row_slots + start + row, mask=(row < count) & (m < BLOCK_Q * GROUP), other=-1)
    used = slot >= 0
    used &= tl.load(edits + slot * edits_stride + head, mask=used, other=0) != 0
    if tl.max(used.to(tl.int32), 0) == 0:
        return

    word = words + slot.to(tl.int64) * words_stride + head * FIELDS
    gamma = tl.load(word + finish.GAMMA, mask=used, other=1.0)[:, None]
    bias_a = tl.load(word + finish.BIAS_A, mask=used, other=0.0)[:, None]
    bias_b = tl.load(word + finish.BIAS_B, mask=used, other=0.0)[:, None]
    abs_a = tl.load(word + finish.ABS_GAIN_A, mask=used, other=0.0)[:, None]
    abs_b = tl.load(word + finish.ABS_GAIN_B, mask=used, other=0.0)[:, None]
    tags_a = _class_of(word, used, finish.REQUIRE_A, finish.EXCLUDE_A)
    tags_b = _class_of(word, used, finish.REQUIRE_B, finish.EXCLUDE_B)
    window_a = tl.load(word + finish.WINDOW_A, mask=used, other=0.0).to(tl.int32)[:, None]
    window_b = tl.load(word + finish.WINDOW_B, mask=used, other=0.0).to(tl.int32)[:, None]
    kept_a = 1.0 - tl.load(word + finish.MOVED_SHARE, mask=used, other=0.0)[:, None]

    position = tl.load(seq_lens + sequence) - count + row
    # Rows that are not edited must not widen the loop.
    low = 0
    if SLIDING:
        low = tl.min(tl.where(used, position - sliding_window + 1, 2147483647), 0)
        low = tl.maximum(low, 0)
    high = tl.max(tl.where(used, position + 1, 0), 0)
    if NUM_SPLITS > 1:
        each = tl.cdiv(tl.cdiv(high - low, BLOCK_N), NUM_SPLITS) * BLOCK_N
        end = high
        low += split * each
        high = tl.minimum(end, low + each)

    d = tl.arange(0, HEAD_PAD)
    inside = d < HEAD_SIZE
    at_row = (start + row).to(tl.int64)
    at_query = query + at_row[:, None] * query_stride + head[:, None] * HEAD_SIZE + d[None, :]
    q = tl.load(at_query, mask=used[:, None] & inside[None, :], other=0.0)
    blocks = block_table + sequence.to(tl.int64) * block_table_stride
    head_cache = cache + kv_head.to(tl.int64) * kv_head_stride
    prompt_len = tl.load(prompt_lens + sequence)
    tag_row = tl.load(tag_rows + sequence)
    # Blocks, not scalars: the interpreter does not combine masks of the two.
    has_tags = tl.full([BLOCK_N], 0, tl.int32) + tag_row >= 0

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mass_a = tl.zeros([BLOCK_M], tl.float32)
    mass_b = tl.zeros([BLOCK_M], tl.float32)
    outside = tl.zeros([BLOCK_M], tl.float32)
    within = tl.zeros([BLOCK_M], tl.float32)
    image_b = tl.zeros([BLOCK_M], tl.float32)
    image_rest = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    acc_outside = acc
    acc_within = acc
    for begin in range(low, high, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        there = key < high
        block = tl.load(blocks + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        offset = key % BLOCK_SIZE
        at_key = head_cache + block * block_stride + offset * slot_stride
        k = tl.load(at_key[None, :] + d[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        tag = tl.where(key >= prompt_len, _OUTPUT, 0)
        if tags is not None:
            at_tag = tags + tag_row.to(tl.int64) * tags_stride + key
            tag |= tl.load(at_tag, mask=there & has_tags, other=0).to(tl.int32)
        if slot_tags is not None:
            of_prompt = there & (key < prompt_len)
            at_slot = slot_tags + block * BLOCK_SIZE + offset
            tag |= tl.load(at_slot, mask=of_prompt, other=0).to(tl.int32)
        tag = tag[None, :]
        distance = position[:, None] - key[None, :]
        in_a = _members(tag, distance, tags_a, window_a)
        in_b = _members(tag, distance, tags_b, window_b)

        x = tl.dot(q, k, input_precision="ieee") * softmax_scale
        if SOFT_CAP:
            # tanh, whose exponential may overflow to infinity: that is 1.
            x = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / soft_cap)))
        size = tl.abs(x)
        logits = gamma * x
        logits += tl.where(in_a, bias_a + abs_a * size, 0.0)
        logits += tl.where(in_b, bias_b + abs_b * size, 0.0)
        seen = (distance >= 0) & there[None, :]
        if SLIDING:
            seen &= distance < sliding_window
        logits = tl.where(seen, logits, float("-inf"))

        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - base)
        top = higher
        p = tl.exp(logits - base[:, None])
        v = tl.load(
            at_key[:, None] + HEAD_SIZE + d[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        if MOVES:
            mass_a = mass_a * shrink + tl.sum(tl.where(in_a, p, 0.0), 1)
            mass_b = mass_b * shrink + tl.sum(tl.where(in_b, p, 0.0), 1)
            image = (tag & _IMAGE) != 0
            image_b = image_b * shrink + tl.sum(tl.where(image & in_b, p, 0.0), 1)
            image_rest = image_rest * shrink + tl.sum(tl.where(image & (in_b == 0), p, 0.0), 1)
            kept = tl.where(in_a, kept_a * p, p)
            p_within = tl.where(in_b, kept, 0.0)
            p_outside = tl.where(in_b, 0.0, kept)
            outside = outside * shrink + tl.sum(p_outside, 1)
            within = within * shrink + tl.sum(p_within, 1)
            acc_outside = acc_outside * shrink[:, None]
            acc_within = acc_within * shrink[:, None]
            acc_outside = tl.dot(p_outside.to(v.dtype), v, acc_outside, input_precision="ieee")
            acc_within = tl.dot(p_within.to(v.dtype), v, acc_within, input_precision="ieee")

    if NUM_SPLITS > 1:
        at = (at_row * NUM_HEADS + head) * NUM_SPLITS + split
        each_stat = stats + at * _STATS
        tl.store(each_stat, top, mask=used)
        tl.store(each_stat + 1, total, mask=used)
        tl.store(each_stat + 2, mass_a, mask=used)
        tl.store(each_stat + 3, mass_b, mask=used)
        tl.store(each_stat + 4, outside, mask=used)
        tl.store(each_stat + 5, within, mask=used)
        tl.store(each_stat + 6, image_b, mask=used)
        tl.store(each_stat + 7, image_rest, mask=used)
        each_part = partial + at[:, None] * ((3 if MOVES else 1) * HEAD_PAD) + d[None, :]
        keep = used[:, None] & inside[None, :]
        tl.store(each_part, acc, mask=keep)
        if MOVES:
            tl.store(each_part + HEAD_PAD, acc_outside, mask=keep)
            tl.store(each_part + 2 * HEAD_PAD, acc_within, mask=keep)
        return

    # Rows that are not edited have no weights: anything but a division by zero.
    total = tl.where(used, total, 1.0)
    g_all, g_outside, g_within, mix, mass_a, mass_b, image_mass, edited = finish.gains_of(
        word, used, total, mass_a, mass_b, outside, within, image_b, image_rest
    )
    z = g_all[:, None] * acc
    if MOVES:
        z += g_outside[:, None] * acc_outside + g_within[:, None] * acc_within
    mixes = used & (mix != 0.0)
    own = finish.own_value(
        head_cache, blocks, position, block_stride, slot_stride, HEAD_SIZE, mixes, BLOCK_SIZE
    )
    value = tl.load(own[:, None] + d[None, :], mask=mixes[:, None] & inside[None, :], other=0.0)
    z = (1.0 - mix)[:, None] * z + mix[:, None] * value.to(tl.float32)
    out = output + at_row[:, None] * output_stride + head[:, None] * HEAD_SIZE + d[None, :]
    tl.store(out, z.to(output.dtype.element_ty), mask=used[:, None] & inside[None, :])
    if readings is not None:
        reading = tl.load(reading_rows + sequence)
        at_reading = readings + (reading.to(tl.int64) * NUM_HEADS + head) * _READINGS
        finish.add_readings(
            at_reading,
            used & (tl.full([BLOCK_M], 0, tl.int32) + reading >= 0),
            position >= prompt_len,
            row == count - 1,
            mass_a,
            mass_b,
            image_mass,
            edited,
        )
