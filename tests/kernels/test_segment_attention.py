"""The fast attention kernel against the formula: drawn shapes, words, tags and block tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.head_word import Mass
from headway.kernels.segment_attention import KernelError, Sequences, segment_attention
from tests.kernels.batches import (
    LENGTHS,
    OPTIONS,
    PLAIN,
    SHAPES,
    Batch,
    assert_rows_close,
    draw_words,
    identity_words,
    on_one_side,
    var_words,
)

pytestmark = pytest.mark.unit


def run(batch: Batch, words: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.full_like(batch.query, 7.0)
    masses = torch.full((batch.total_rows, batch.query.shape[1], len(Mass)), torch.nan)
    rows = torch.tensor([rows for _, rows in batch.lengths])
    position = torch.tensor([length - rows for length, rows in batch.lengths])
    # Tables have rows of their own order, as the tables of an engine do.
    order = torch.arange(len(rows)).flip(0)
    sequences = Sequences(
        batch.first_row.int(),
        rows.int(),
        position.int(),
        batch.prompt_len.int(),
        table_row=order.int(),
        tag_row=order.int(),
        mass_row=(rows.cumsum(0) - rows).int(),
    )
    segment_attention(
        batch.query,
        batch.cache,
        output,
        batch.block_table.flip(0).contiguous(),
        sequences,
        words,
        tags=batch.tags.flip(0).to(torch.uint8).contiguous(),
        slot_tags=batch.slot_tags,
        masses=masses,
        **options,
    )
    return output, masses


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), SHAPES, LENGTHS, OPTIONS)
def test_float32_equals_the_formula(seed, shape, lengths, options):
    if shape["group"] == 50:
        lengths = [(length, min(rows, 4)) for length, rows in lengths[:2]]
    batch = Batch(seed, torch.float32, shape, lengths)
    words = draw_words(seed, batch.num_sequences, shape["num_heads"])
    (got, masses), (want, want_masses) = (
        run(batch, words, **options),
        batch.expect(words, **options),
    )
    sure = on_one_side(want_masses, masses)
    torch.testing.assert_close(masses[..., :3], want_masses[..., :3], atol=1e-5, rtol=1e-5)
    assert_rows_close(batch, got, want, sure, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), SHAPES, LENGTHS, OPTIONS)
def test_bfloat16_equals_the_formula(seed, shape, lengths, options):
    lengths = [(length, min(rows, 4)) for length, rows in lengths[:3]]
    batch = Batch(seed, torch.bfloat16, shape, lengths)
    words = draw_words(seed, batch.num_sequences, shape["num_heads"])
    (got, masses), (want, want_masses) = (
        run(batch, words, **options),
        batch.expect(words, **options),
    )
    # 2e-2 of the largest value in a row: z is rounded to bfloat16, and a sum may cancel.
    scale = want.abs().amax(-1, keepdim=True).clamp_min(1e-3)
    sure = on_one_side(want_masses, masses)
    assert_rows_close(batch, got.float() / scale, want / scale, sure, atol=2e-2, rtol=0.0)


def test_moving_mass_keeps_the_sum_of_a_row():
    """With all values 1 the output is the sum of the row."""
    batch = Batch(3, torch.float32, PLAIN, [(150, 20), (40, 40), (1, 1)])
    batch.cache.view(len(batch.cache), 2, -1)[:, :, 32 * 64 :] = 1.0
    words = var_words(batch.num_sequences, 6)
    got, masses = run(batch, words, softmax_scale=0.125)
    assert ((masses[..., Mass.A] > 0) & (masses[..., Mass.B] > 0)).any()
    for index, (_, rows) in enumerate(batch.lengths):
        start = int(batch.first_row[index])
        assert (got[start : start + rows] - 1).abs().max() < 1e-5


def test_a_cache_full_of_nan_outside_the_sequences_does_no_harm():
    batch = Batch(5, torch.float32, PLAIN, [(33, 33), (64, 1)])
    got, masses = run(batch, draw_words(5, batch.num_sequences, 6), softmax_scale=0.2)
    assert torch.isfinite(got).all() and torch.isfinite(masses).all()


def test_the_drawn_words_matter():
    """The reference tells words apart, so that the tests above can fail."""
    batch = Batch(7, torch.float32, PLAIN, [(120, 1)] * 20)
    plain, _ = batch.expect(identity_words(20, 6), softmax_scale=0.2)
    edited, masses = batch.expect(draw_words(7, 20, 6), softmax_scale=0.2)
    assert ((plain - edited).abs().amax(-1) > 1e-3).float().mean() > 0.3
    assert set(masses[..., Mass.EDITED].unique().tolist()) == {0.0, 1.0}


def test_no_sequence_is_no_work():
    batch = Batch(1, torch.float32, PLAIN, [(3, 1)])
    empty = torch.zeros(0, dtype=torch.int32)
    output = torch.full_like(batch.query, 7.0)
    sequences = Sequences(*[empty] * 7)
    args = batch.query, batch.cache, output, batch.block_table, sequences
    segment_attention(*args, identity_words(0, 6), 0.1)
    assert (output == 7).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query": lambda q: q.half()}, "one dtype"),
        ({"output": lambda o: o[:, :3]}, "shaped as query"),
        ({"words": lambda w: w[:-1]}, "every head of every sequence"),
        ({"words": lambda w: w.double()}, "every head of every sequence"),
        ({"kv_cache": lambda c: c[:, :, :16].contiguous()}, "block size"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, named):
    batch = Batch(1, torch.float32, PLAIN, [(3, 1)])
    one = torch.ones(1, dtype=torch.int32)
    args = {
        "query": batch.query,
        "kv_cache": batch.cache,
        "output": torch.zeros_like(batch.query),
        "block_table": batch.block_table,
        "sequences": Sequences(one, one, one * 2, one, one * 0, -one, -one),
        "words": identity_words(1, 6),
        "softmax_scale": 0.1,
    }
    for name, function in change.items():
        args[name] = function(args[name])
    with pytest.raises(KernelError, match=named):
        segment_attention(**args)


def test_vectors_that_do_not_fit_are_refused():
    one = torch.ones(1, dtype=torch.int32)
    for wrong in (one.long(), torch.ones(2, dtype=torch.int32)):
        with pytest.raises(KernelError, match="int32 vectors"):
            Sequences(one, one, one, one, one, one, wrong)
