"""The end of segment attention: masses to gains, and the sum over splits of the keys.

Shared by the kernel of `segment_attention.py`, which ends here where one program saw all keys of
its rows, and by the reduction over programs that each saw a part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.head_word import Field, Mass

NUM_STATS = 8
"""Per (row, head, split): the maximum and the seven sums that `gains_of` takes."""

NUM_READINGS = 8
"""Columns of `readings`: sums of the four of `Mass`, then A, B and image of the last row."""

GAMMA = tl.constexpr(int(Field.GAMMA))
BIAS_A = tl.constexpr(int(Field.BIAS_A))
BIAS_B = tl.constexpr(int(Field.BIAS_B))
ABS_GAIN_A = tl.constexpr(int(Field.ABS_GAIN_A))
ABS_GAIN_B = tl.constexpr(int(Field.ABS_GAIN_B))
MOVED_SHARE = tl.constexpr(int(Field.MOVED_SHARE))
GAIN_B = tl.constexpr(int(Field.GAIN_B))
RENORM = tl.constexpr(int(Field.RENORM))
IDENTITY_MIX = tl.constexpr(int(Field.IDENTITY_MIX))
MIN_IMAGE_MASS = tl.constexpr(int(Field.MIN_IMAGE_MASS))
MIN_SHARE_B = tl.constexpr(int(Field.MIN_SHARE_B))
MIN_IMAGE_REST = tl.constexpr(int(Field.MIN_IMAGE_REST))
REQUIRE_A = tl.constexpr(int(Field.REQUIRE_A))
EXCLUDE_A = tl.constexpr(int(Field.EXCLUDE_A))
WINDOW_A = tl.constexpr(int(Field.WINDOW_A))
REQUIRE_B = tl.constexpr(int(Field.REQUIRE_B))
EXCLUDE_B = tl.constexpr(int(Field.EXCLUDE_B))
WINDOW_B = tl.constexpr(int(Field.WINDOW_B))

_A, _B, _IMAGE, _EDITED = (tl.constexpr(int(mass)) for mass in Mass)
_STATS = tl.constexpr(NUM_STATS)
_READINGS = tl.constexpr(NUM_READINGS)


@triton.jit
def gains_of(word, used, total, mass_a, mass_b, outside, within, image_b, image_rest):
    """Gains of the three accumulators, the identity mix, and what is read out.

    word: pointers to head words, `used`: which of them may be read. Then sums of weights, not yet
    divided by `total`, that of all; the gains are: of all keys, of the keys outside of B and within
    it, where the weights of A are multiplied by 1 - p already.
    """
    norm = 1.0 / total
    mass_a *= norm
    mass_b *= norm
    image_b *= norm
    image_rest *= norm
    image = image_b + image_rest
    min_image = tl.load(word + MIN_IMAGE_MASS, mask=used, other=0.0)
    min_share = tl.load(word + MIN_SHARE_B, mask=used, other=0.0)
    min_rest = tl.load(word + MIN_IMAGE_REST, mask=used, other=0.0)
    met = (image >= min_image) & (image_b >= min_share * image) & (image_rest >= min_rest)
    # With no mass in B there is nowhere to move any to, and no gain of B means anything.
    edits = met & (mass_b > 0.0)
    moved = tl.load(word + MOVED_SHARE, mask=used, other=0.0)
    gain_b = tl.load(word + GAIN_B, mask=used, other=1.0)
    gain_b += moved * mass_a / tl.where(mass_b > 0.0, mass_b, 1.0)
    left = outside + gain_b * within
    renorm = tl.load(word + RENORM, mask=used, other=0.0)
    edited_norm = tl.where((renorm != 0.0) & (left > 0.0), 1.0 / left, norm)
    mix = tl.where(met, tl.load(word + IDENTITY_MIX, mask=used, other=0.0), 0.0)
    conditional = (min_image != 0.0) | (min_share != 0.0) | (min_rest != 0.0)
    return (
        tl.where(edits, 0.0, norm),
        tl.where(edits, edited_norm, 0.0),
        tl.where(edits, edited_norm * gain_b, 0.0),
        mix,
        mass_a,
        mass_b,
        image,
        (met & conditional).to(tl.float32),
    )


@triton.jit
def add_readings(at, use, is_output, is_last, mass_a, mass_b, image, edited):
    """Add one row's masses to its request's readings; at: pointers to their first column."""
    tl.atomic_add(at + _A, mass_a, mask=use & is_output)
    tl.atomic_add(at + _B, mass_b, mask=use & is_output)
    tl.atomic_add(at + _IMAGE, image, mask=use & is_output)
    tl.atomic_add(at + _EDITED, edited, mask=use & (edited != 0.0))
    tl.store(at + 4 + _A, mass_a, mask=use & is_last)
    tl.store(at + 4 + _B, mass_b, mask=use & is_last)
    tl.store(at + 4 + _IMAGE, image, mask=use & is_last)


@triton.jit
def own_value(cache, block_table, position, block_stride, slot_stride, value_at, use, BLOCK_SIZE):
    """Pointers to the value of the key at a query's own position; cache is at its KV head."""
    block = tl.load(block_table + position // BLOCK_SIZE, mask=use, other=0).to(tl.int64)
    return cache + block * block_stride + (position % BLOCK_SIZE) * slot_stride + value_at


@triton.jit
def reduce_splits(
    output,
    cache,
    block_table,
    query_start_loc,
    seq_lens,
    row_slots,
    prompt_lens,
    reading_rows,
    edits,
    words,
    readings,
    partial,
    stats,
    output_stride,
    block_stride,
    kv_head_stride,
    slot_stride,
    block_table_stride,
    edits_stride,
    words_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    FIELDS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MOVES: tl.constexpr,
):
    """One program a (request, head), its query being one row: join what the splits found."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(query_start_loc + sequence)
    if tl.load(query_start_loc + sequence + 1) <= row:
        return
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    if tl.load(edits + slot * edits_stride + head) == 0:
        return
    position = tl.load(seq_lens + sequence) - 1
    splits = tl.arange(0, NUM_SPLITS)
    at = (row.to(tl.int64) * NUM_HEADS + head) * NUM_SPLITS
    each = stats + (at + splits) * _STATS
    tops = tl.load(each)
    shrink = tl.exp(tops - tl.max(tops, 0))
    # Blocks of one, not scalars: the interpreter does not combine masks of the two.
    one = tl.arange(0, 1)
    zero = one.to(tl.float32)
    total = zero + tl.sum(tl.load(each + 1) * shrink, 0)
    mass_a = zero + tl.sum(tl.load(each + 2) * shrink, 0)
    mass_b = zero + tl.sum(tl.load(each + 3) * shrink, 0)
    outside = zero + tl.sum(tl.load(each + 4) * shrink, 0)
    within = zero + tl.sum(tl.load(each + 5) * shrink, 0)
    image_b = zero + tl.sum(tl.load(each + 6) * shrink, 0)
    image_rest = zero + tl.sum(tl.load(each + 7) * shrink, 0)

    word = words + slot * words_stride + head * FIELDS + one
    used = one == 0
    g_all, g_outside, g_within, mix, mass_a, mass_b, image, edited = gains_of(
        word, used, total, mass_a, mass_b, outside, within, image_b, image_rest
    )
    d = tl.arange(0, HEAD_PAD)
    inside = d < HEAD_SIZE
    z = tl.zeros([HEAD_PAD], tl.float32)
    for which in tl.static_range(3 if MOVES else 1):
        part = ((at + splits[:, None]) * (3 if MOVES else 1) + which) * HEAD_PAD + d[None, :]
        # No key of the head's padding was stored: its memory may hold anything.
        sums = tl.load(partial + part, mask=inside[None, :], other=0.0)
        gain = g_all if which == 0 else (g_outside if which == 1 else g_within)
        z += gain * tl.sum(sums * shrink[:, None], 0)
    head_cache = cache + (head // GROUP) * kv_head_stride
    own = own_value(
        head_cache,
        block_table + sequence.to(tl.int64) * block_table_stride,
        position + one,
        block_stride,
        slot_stride,
        HEAD_SIZE,
        used,
        BLOCK_SIZE,
    )
    mixes = inside & (tl.zeros([HEAD_PAD], tl.float32) + mix != 0.0)
    value = tl.load(own + d, mask=mixes, other=0.0).to(tl.float32)
    z = (1.0 - mix) * z + mix * value
    out = output + row.to(tl.int64) * output_stride + head * HEAD_SIZE + d
    tl.store(out, z.to(output.dtype.element_ty), mask=inside)
    if readings is not None:
        reading = one + tl.load(reading_rows + sequence)
        counts = position + one >= tl.load(prompt_lens + sequence)
        at_reading = readings + (reading.to(tl.int64) * NUM_HEADS + head) * _READINGS
        add_readings(at_reading, reading >= 0, counts, used, mass_a, mass_b, image, edited)
