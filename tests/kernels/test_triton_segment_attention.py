"""The Triton attention kernel against the formula, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from headway.kernels.head_word import Field, Mass
from headway.kernels.triton.segment_attention import (
    Rows,
    Workspace,
    segment_attention,
    splits_of,
)
from headway.kernels.triton.segment_finish import NUM_READINGS
from tests.kernels.batches import (
    PLAIN,
    Batch,
    assert_rows_close,
    draw_words,
    identity_words,
    var_words,
)

pytestmark = pytest.mark.unit

SHAPES = st.fixed_dictionaries(
    {
        "num_kv_heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 3, 4, 20]),
        "head_size": st.sampled_from([32, 64, 80]),
        "block_size": st.sampled_from([16, 32, 48]),
    }
).map(lambda shape: shape | {"num_heads": shape["num_kv_heads"] * shape["group"]})
LENGTHS = st.lists(
    st.integers(1, 130).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 24)))),
    min_size=1,
    max_size=3,
)
OPTIONS = st.fixed_dictionaries(
    {
        "softmax_scale": st.sampled_from([0.125, 0.3]),
        "soft_cap": st.sampled_from([0.0, 0.0, 2.5]),
        "sliding_window": st.sampled_from([-1, -1, 1, 31, 70]),
    }
)
# The interpreter is slow: a failing example is shown as it was drawn, not made smaller.
INTERPRETED = {"deadline": None, "phases": (Phase.explicit, Phase.generate)}
CONDITIONS = [Field.MIN_IMAGE_MASS, Field.MIN_SHARE_B, Field.MIN_IMAGE_REST]
LAYOUT = st.sampled_from(["nhd", "hnd"])


def rows_of(batch: Batch, slots: torch.Tensor, readings: torch.Tensor) -> tuple[Rows, list[int]]:
    """The batch's sequences, a request of one row that nobody steers before each, and padding.

    slots: of each sequence. Also the requests that the sequences are.
    """
    loc, lens, row_slots, requests = [0], [], [], []
    for index, (length, rows) in enumerate(batch.lengths):
        loc += [loc[-1] + 1, loc[-1] + 1 + rows]
        lens += [1, length]
        row_slots += [-1] + [int(slots[index])] * rows
        requests.append(2 * index + 1)
    loc, lens = loc + [loc[-1]] * 2, lens + [0, 0]

    def by_request(values: torch.Tensor, other: int) -> torch.Tensor:
        spread = torch.full((len(lens),), other, dtype=torch.int32)
        spread[requests] = values.int()
        return spread

    count = len(batch.lengths)
    return Rows(
        torch.tensor(loc, dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        torch.tensor(row_slots + [-1] * 3, dtype=torch.int32),
        by_request(batch.prompt_len, 0),
        by_request(torch.arange(count).flip(0), -1),
        by_request(readings, -1),
        max(rows for _, rows in batch.lengths),
    ), requests


def run(
    batch: Batch, words: torch.Tensor, edits: torch.Tensor | None = None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and readings [sequences, num_heads, 8]."""
    count, heads = words.shape[:2]
    table = torch.full((count + 2, heads, len(Field)), torch.nan)
    slots = torch.arange(count).flip(0) + 1
    table[slots] = words
    flags = torch.full((count + 2, heads), 1, dtype=torch.uint8)
    if edits is not None:
        flags[slots] = edits.to(torch.uint8)
    rows, requests = rows_of(batch, slots, torch.arange(count))
    block_table = torch.full((len(rows.seq_lens), batch.block_table.shape[1]), -(10**6)).int()
    block_table[requests] = batch.block_table
    output = torch.full_like(batch.query, 7.0)
    readings = torch.zeros(count, heads, NUM_READINGS)
    segment_attention(
        batch.query,
        batch.cache,
        output,
        block_table,
        rows,
        table,
        flags,
        tags=batch.tags.flip(0).to(torch.uint8).contiguous(),
        slot_tags=batch.slot_tags,
        readings=readings,
        **options,
    )
    return output, readings


def sure_rows(batch: Batch, words: torch.Tensor, **options) -> torch.Tensor:
    """bool [rows, heads]: where no condition is so near its edge that rounding may tip it."""
    decided = []
    for factor in (1 - 1e-4, 1 + 1e-4):
        moved = words.clone()
        moved[..., CONDITIONS] *= factor
        decided.append(batch.expect(moved, **options)[1][..., Mass.EDITED])
    sure = decided[0] == decided[1]
    assert sure.float().mean() > 0.95
    return sure


def assert_readings(batch: Batch, words, readings, masses, sure) -> None:
    """Masses of output rows added up, conditions counted, and the last row's masses."""
    done = 0
    for index, (length, rows) in enumerate(batch.lengths):
        mass, agreed = masses[done : done + rows], sure[done : done + rows].all(0)
        done += rows
        is_output = torch.arange(length - rows, length) >= batch.prompt_len[index]
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(readings[index, :, :3], mass[is_output, :, :3].sum(0), **close)
        torch.testing.assert_close(readings[index, :, 4:7], mass[-1, :, :3], **close)
        conditional = (words[index][:, CONDITIONS] != 0).any(-1)
        met = mass[..., Mass.EDITED].sum(0) * conditional
        assert (readings[index, agreed, Mass.EDITED] == met[agreed]).all()


@settings(max_examples=25, **INTERPRETED)
@given(st.integers(0, 10**6), SHAPES, LENGTHS, OPTIONS, LAYOUT)
def test_float32_equals_the_formula(seed, shape, lengths, options, layout):
    batch = Batch(seed, torch.float32, shape, lengths, layout)
    words = draw_words(seed, batch.num_sequences, shape["num_heads"])
    (got, readings), (want, masses) = run(batch, words, **options), batch.expect(words, **options)
    sure = sure_rows(batch, words, **options)
    assert_rows_close(batch, got, want, sure, atol=1e-4, rtol=1e-4)
    assert_readings(batch, words, readings, masses, sure)


@settings(max_examples=10, **INTERPRETED)
@given(
    st.integers(0, 10**6),
    SHAPES,
    LENGTHS,
    OPTIONS,
    LAYOUT,
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_half_precision_equals_the_formula(seed, shape, lengths, options, layout, dtype):
    lengths = [(length, min(rows, 4)) for length, rows in lengths]
    batch = Batch(seed, dtype, shape, lengths, layout)
    words = draw_words(seed, batch.num_sequences, shape["num_heads"])
    (got, _), (want, _) = run(batch, words, **options), batch.expect(words, **options)
    # 2e-2 of the largest value in a row: weights and z are rounded, and a sum may cancel.
    scale = want.abs().amax(-1, keepdim=True).clamp_min(1e-3)
    sure = sure_rows(batch, words, **options)
    assert_rows_close(batch, got.float() / scale, want / scale, sure, atol=2e-2, rtol=0.0)


@settings(max_examples=10, **INTERPRETED)
@given(
    st.integers(0, 10**6),
    SHAPES.filter(lambda shape: shape["group"] < 20),
    st.lists(st.integers(1, 300), min_size=1, max_size=2),
    OPTIONS,
    st.sampled_from([2, 4, 16]),
)
def test_divided_sequences_equal_the_formula(seed, shape, lengths, options, num_splits):
    """Decode steps, each sequence divided among programs; what they leave behind is poisoned."""
    batch = Batch(seed, torch.float32, shape, [(length, 1) for length in lengths], "nhd")
    words = draw_words(seed, batch.num_sequences, shape["num_heads"])
    workspace = Workspace(2 * len(lengths) + 2, shape["num_heads"], shape["head_size"], "cpu")
    workspace.partial.fill_(torch.nan)
    workspace.stats.fill_(torch.nan)
    got, readings = run(batch, words, **options, workspace=workspace, num_splits=num_splits)
    want, masses = batch.expect(words, **options)
    sure = sure_rows(batch, words, **options)
    assert_rows_close(batch, got, want, sure, atol=1e-4, rtol=1e-4)
    assert_readings(batch, words, readings, masses, sure)


@settings(max_examples=8, **INTERPRETED)
@given(st.integers(0, 10**6), SHAPES, LENGTHS, OPTIONS, st.sampled_from([1, 4]))
def test_edits_of_logits_alone_need_one_accumulator(seed, shape, lengths, options, num_splits):
    if num_splits > 1:
        lengths = [(length, 1) for length, _ in lengths]
    batch = Batch(seed, torch.float32, shape, lengths, "hnd")
    heads = shape["num_heads"]
    words = draw_words(seed, batch.num_sequences, heads)
    after_softmax = [*CONDITIONS, Field.MOVED_SHARE, Field.GAIN_B, Field.RENORM]
    words[..., after_softmax] = identity_words(1, 1)[0, 0, after_softmax]
    workspace = Workspace(2 * len(lengths) + 2, heads, shape["head_size"], "cpu")
    split = {"workspace": workspace, "num_splits": num_splits}
    got, _ = run(batch, words, moves=False, **split, **options)
    want, masses = batch.expect(words, **options)
    everywhere = torch.ones(masses.shape[:2], dtype=torch.bool)
    assert_rows_close(batch, got, want, everywhere, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_heads_that_do_not_edit_keep_what_the_base_kernel_wrote(num_splits):
    lengths = [(150, 1), (40, 1)] if num_splits > 1 else [(150, 20), (40, 40)]
    batch = Batch(11, torch.float32, PLAIN, lengths, "nhd")
    words = draw_words(11, 2, 6)
    edits = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
    split = {"workspace": Workspace(6, 6, 64, "cpu"), "num_splits": num_splits}
    all_heads, _ = run(batch, words, softmax_scale=0.2, **split)
    got, readings = run(batch, words, edits, softmax_scale=0.2, **split)
    for index, (_, rows) in enumerate(lengths):
        start = int(batch.first_row[index])
        own, chosen = slice(start, start + rows), edits[index].bool()
        assert (got[own][:, chosen] == all_heads[own][:, chosen]).all()
        assert (got[own][:, ~chosen] == 7.0).all()
        assert (readings[index][~chosen] == 0).all()


def test_rows_of_one_request_may_have_different_words():
    """A chunk that goes from prompt to output, as after a preemption."""
    batch = Batch(12, torch.float32, PLAIN, [(90, 40)], "hnd")
    first, second = draw_words(12, 1, 6), draw_words(13, 1, 6)
    want, masses = batch.expect(first, softmax_scale=0.2)
    want[17:] = batch.expect(second, softmax_scale=0.2)[0][17:]
    rows, _ = rows_of(batch, torch.tensor([0]), torch.tensor([-1]))
    rows.row_slots[17:41] = 1
    table = torch.cat([first, second])
    output = torch.full_like(batch.query, 7.0)
    segment_attention(
        batch.query,
        batch.cache,
        output,
        batch.block_table.expand(4, -1).contiguous(),
        rows,
        table,
        torch.ones(table.shape[:2], dtype=torch.uint8),
        0.2,
        tags=batch.tags.to(torch.uint8),
        slot_tags=batch.slot_tags,
    )
    torch.testing.assert_close(output, want, atol=1e-4, rtol=1e-4)


def test_rows_that_nobody_steers_touch_no_memory():
    """Keys, values, words and tables are poisoned: the kernel must leave before it reads them."""
    batch = Batch(14, torch.float32, PLAIN, [(90, 40), (60, 1)], "nhd")
    batch.cache.fill_(torch.nan)
    rows, _ = rows_of(batch, torch.tensor([-1, -1]), torch.tensor([0, 1]))
    table = torch.full((1, 6, len(Field)), torch.nan)
    readings = torch.zeros(2, 6, NUM_READINGS)
    output = torch.full_like(batch.query, 7.0)
    block_table = torch.full((6, 9), -(10**9), dtype=torch.int32)
    edits = torch.zeros(1, 6, dtype=torch.uint8)
    args = batch.query, batch.cache, output, block_table, rows, table, edits, 0.2
    segment_attention(*args, readings=readings)
    rows.row_slots.clamp_(min=0)  # steered, but the word edits nothing at this layer
    segment_attention(*args, readings=readings)
    assert (output == 7.0).all() and (readings == 0).all()


def test_moving_mass_keeps_the_sum_of_a_row():
    batch = Batch(3, torch.float32, PLAIN, [(150, 20), (40, 40), (1, 1)], "hnd")
    batch.cache[..., 64:] = 1.0
    got, readings = run(batch, var_words(3, 6), softmax_scale=0.125)
    assert (readings[..., [4, 5]] > 0).any()
    for index, (_, rows) in enumerate(batch.lengths):
        start = int(batch.first_row[index])
        assert (got[start : start + rows] - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("num_reqs", "num_kv_heads", "max_seq_len", "expected"),
    [(1, 8, 32768, 16), (16, 8, 32768, 1), (4, 8, 32768, 4), (1, 8, 100, 1), (3, 2, 1000, 2)],
)
def test_a_small_batch_divides_its_sequences(num_reqs, num_kv_heads, max_seq_len, expected):
    assert splits_of(num_reqs, num_kv_heads, max_seq_len, num_sms=108) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query": lambda q: q.double()}, "one dtype"),
        ({"output": lambda o: o[:, :3]}, "shaped as query"),
        ({"words": lambda w: w[..., :-1]}, "every head"),
        ({"edits": lambda e: e.bool()}, "edits must be uint8"),
        ({"kv_cache": lambda c: c.transpose(2, 3)}, "side by side"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, named):
    batch = Batch(1, torch.float32, PLAIN, [(3, 1)], "hnd")
    args = {
        "query": batch.query,
        "kv_cache": batch.cache,
        "output": torch.zeros_like(batch.query),
        "block_table": batch.block_table,
        "rows": rows_of(batch, torch.tensor([0]), torch.tensor([-1]))[0],
        "words": identity_words(1, 6),
        "edits": torch.ones(1, 6, dtype=torch.uint8),
        "softmax_scale": 0.1,
    }
    for name, function in change.items():
        args[name] = function(args[name])
    with pytest.raises(ValueError, match=named):
        segment_attention(**args)
