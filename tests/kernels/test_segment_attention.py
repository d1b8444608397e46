"""The fast attention kernel against the formula: drawn shapes, words, tags and block tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.head_word import Field, Mass, Tag
from headway.kernels.reference import segment_attention_reference
from headway.kernels.segment_attention import KernelError, Sequences, segment_attention

pytestmark = pytest.mark.unit

TAGS = [0, Tag.IMAGE, Tag.SINK, Tag.EMPHASISED, Tag.IMAGE | Tag.SINK, Tag.OUTPUT]


class Batch:
    """Ragged sequences in a paged cache of shuffled blocks, everything that is unused being NaN."""

    def __init__(self, seed: int, dtype: torch.dtype, shape: dict, lengths: list[tuple[int, int]]):
        draw = torch.Generator().manual_seed(seed)
        heads, kv_heads, size = shape["num_heads"], shape["num_kv_heads"], shape["head_size"]
        block_size = self.block_size = shape["block_size"]
        self.lengths = lengths
        blocks = [-(-length // block_size) for length, _ in lengths]
        free = torch.randperm(sum(blocks) + 5, generator=draw).int()
        self.cache = torch.full((len(free), kv_heads, block_size, 2 * size), torch.nan, dtype=dtype)
        self.block_table = torch.full((len(lengths), max(blocks) + 1), -(10**6), dtype=torch.int32)
        self.keys, self.values = [], []
        laid_out = self.cache.view(len(free), kv_heads, 2 * block_size * size)
        for index, ((length, _), count) in enumerate(zip(lengths, blocks, strict=True)):
            self.block_table[index, :count], free = free[:count], free[count:]
            key = torch.randn(length, kv_heads, size, generator=draw).to(dtype)
            value = torch.randn(length, kv_heads, size, generator=draw).to(dtype)
            for position in range(length):
                block = int(self.block_table[index, position // block_size])
                offset = position % block_size
                halves = laid_out[block].view(kv_heads, 2, block_size * size)
                halves[:, 0].view(kv_heads, size, block_size)[:, :, offset] = key[position]
                halves[:, 1].view(kv_heads, block_size, size)[:, offset] = value[position]
            self.keys.append(key)
            self.values.append(value)
        # A row that belongs to nobody before every sequence: the kernel must leave it alone.
        rows = [1 + rows for _, rows in lengths]
        self.first_row = torch.tensor([sum(rows[:i]) + 1 for i in range(len(rows))])
        self.query = torch.randn(sum(rows), heads, size, generator=draw).to(dtype)
        chosen = torch.randint(len(TAGS), (len(lengths), 400), generator=draw)
        # Tags come in runs, as images do, with some single ones.
        chosen = torch.where(
            torch.rand(chosen.shape, generator=draw) < 0.1,
            chosen,
            chosen[:, ::40].repeat_interleave(40, 1),
        )
        values = torch.tensor([int(tag) for tag in TAGS])
        self.tags = values[chosen] & ~int(Tag.SINK | Tag.OUTPUT)
        self.slot_tags = torch.where(
            torch.rand(len(self.cache) * block_size, generator=draw) < 0.1, int(Tag.SINK), 0
        ).to(torch.uint8)
        self.prompt_len = torch.tensor(
            [int(torch.randint(0, length + 9, (1,), generator=draw)) for length, _ in lengths]
        )

    @property
    def total_rows(self) -> int:
        return sum(rows for _, rows in self.lengths)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def positions(self, index: int) -> torch.Tensor:
        length, rows = self.lengths[index]
        return torch.arange(length - rows, length)

    def key_tags(self, index: int) -> torch.Tensor:
        """All tags of a sequence's keys, as the kernel puts them together."""
        position = torch.arange(self.lengths[index][0])
        block = self.block_table[index][position // self.block_size].long()
        slot = block * self.block_size + position % self.block_size
        is_output = position >= self.prompt_len[index]
        late = torch.where(is_output, int(Tag.OUTPUT), self.slot_tags[slot].long())
        return self.tags[index][position] | late

    def run(self, words: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
        output = torch.full_like(self.query, 7.0)
        masses = torch.full((self.total_rows, self.query.shape[1], len(Mass)), torch.nan)
        rows = torch.tensor([rows for _, rows in self.lengths])
        position = torch.tensor([length - rows for length, rows in self.lengths])
        # Tables have rows of their own order, as the tables of an engine do.
        order = torch.arange(len(rows)).flip(0)
        sequences = Sequences(
            self.first_row.int(),
            rows.int(),
            position.int(),
            self.prompt_len.int(),
            table_row=order.int(),
            tag_row=order.int(),
            mass_row=(rows.cumsum(0) - rows).int(),
        )
        segment_attention(
            self.query,
            self.cache,
            output,
            self.block_table.flip(0).contiguous(),
            sequences,
            words,
            tags=self.tags.flip(0).to(torch.uint8).contiguous(),
            slot_tags=self.slot_tags,
            masses=masses,
            **options,
        )
        return output, masses

    def expect(self, words: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
        output, masses = torch.full(self.query.shape, 7.0), []
        for index, (_, rows) in enumerate(self.lengths):
            start = int(self.first_row[index])
            z, mass = segment_attention_reference(
                self.query[start : start + rows],
                self.keys[index],
                self.values[index],
                self.positions(index),
                self.key_tags(index),
                words[index].expand(rows, -1, -1),
                **options,
            )
            output[start : start + rows] = z
            masses.append(mass)
        return output, torch.cat(masses)


def identity_words(sequences: int, heads: int) -> torch.Tensor:
    words = torch.zeros(sequences, heads, len(Field))
    words[..., [Field.GAMMA, Field.GAIN_B, Field.SCALE]] = 1.0
    words[..., Field.SHIFT_INDEX] = -1
    return words


def draw_words(seed: int, sequences: int, heads: int) -> torch.Tensor:
    """Every field drawn, each used in about half of the words; conditions away from their edges."""
    draw = torch.Generator().manual_seed(seed)
    words = identity_words(sequences, heads)
    shape = sequences, heads

    def maybe(field: Field, values: list[float], share: float = 0.5) -> None:
        chosen = torch.tensor(values)[torch.randint(len(values), shape, generator=draw)]
        use = torch.rand(shape, generator=draw) < share
        words[..., field] = torch.where(use, chosen, words[..., field])

    maybe(Field.GAMMA, [0.0, 0.5, 1.5], 0.3)
    maybe(Field.BIAS_A, [-4.6, 0.2, -1e30])
    maybe(Field.BIAS_B, [0.14, -2.0])
    maybe(Field.ABS_GAIN_A, [0.3], 0.3)
    maybe(Field.ABS_GAIN_B, [-0.2, 0.4], 0.3)
    maybe(Field.MOVED_SHARE, [0.6, 1.0, 0.25])
    maybe(Field.GAIN_B, [1.15, 0.0, 3.0], 0.3)
    maybe(Field.RENORM, [1.0])
    maybe(Field.IDENTITY_MIX, [0.5, 1.0], 0.3)
    maybe(Field.MIN_IMAGE_MASS, [0.2], 0.3)
    maybe(Field.MIN_SHARE_B, [0.5, 0.8], 0.3)
    maybe(Field.MIN_IMAGE_REST, [1e-30], 0.2)
    bits = [float(tag) for tag in (Tag.IMAGE, Tag.SINK, Tag.EMPHASISED, Tag.OUTPUT, 3)]
    for field in (Field.REQUIRE_A, Field.EXCLUDE_A, Field.REQUIRE_B, Field.EXCLUDE_B):
        maybe(field, bits)
    for field in (Field.WINDOW_A, Field.WINDOW_B):
        maybe(field, [1.0, 8.0, 33.0, 64.0])
    return words


SHAPES = st.fixed_dictionaries(
    {
        "num_kv_heads": st.sampled_from([1, 2, 3]),
        "group": st.sampled_from([1, 2, 3, 4, 7, 50]),
        "head_size": st.sampled_from([32, 64, 80, 96, 128]),
        "block_size": st.sampled_from([32, 64, 128]),
    }
).map(lambda shape: shape | {"num_heads": shape["num_kv_heads"] * shape["group"]})
LENGTHS = st.lists(
    st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 60)))),
    min_size=1,
    max_size=4,
).map(lambda drawn: [(length, rows if length < 90 else min(rows, 3)) for length, rows in drawn])
OPTIONS = st.fixed_dictionaries(
    {
        "softmax_scale": st.sampled_from([0.125, 0.3]),
        "soft_cap": st.sampled_from([0.0, 0.0, 2.5]),
        "sliding_window": st.sampled_from([-1, -1, 1, 31, 70]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), SHAPES, LENGTHS, OPTIONS)
def test_float32_equals_the_formula(seed, shape, lengths, options):
    if shape["group"] == 50:
        lengths = [(length, min(rows, 4)) for length, rows in lengths[:2]]
    batch = Batch(seed, torch.float32, shape, lengths)
    words = draw_words(seed, batch.num_sequences, shape["num_heads"])
    (got, masses), (want, want_masses) = batch.run(words, **options), batch.expect(words, **options)
    sure = on_one_side(want_masses, masses)
    torch.testing.assert_close(masses[..., :3], want_masses[..., :3], atol=1e-5, rtol=1e-5)
    assert_rows_close(batch, got, want, sure, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), SHAPES, LENGTHS, OPTIONS)
def test_bfloat16_equals_the_formula(seed, shape, lengths, options):
    lengths = [(length, min(rows, 4)) for length, rows in lengths[:3]]
    batch = Batch(seed, torch.bfloat16, shape, lengths)
    words = draw_words(seed, batch.num_sequences, shape["num_heads"])
    (got, masses), (want, want_masses) = batch.run(words, **options), batch.expect(words, **options)
    # 2e-2 of the largest value in a row: z is rounded to bfloat16, and a sum may cancel.
    scale = want.abs().amax(-1, keepdim=True).clamp_min(1e-3)
    sure = on_one_side(want_masses, masses)
    assert_rows_close(batch, got.float() / scale, want / scale, sure, atol=2e-2, rtol=0.0)


def on_one_side(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """bool [rows, heads]: where both decided a condition alike; rounding may tip it on its edge."""
    same = want[..., Mass.EDITED] == got[..., Mass.EDITED]
    assert same.float().mean() > 0.98
    return same


def assert_rows_close(batch, got, want, sure, **tolerance) -> None:
    done = 0
    touched = torch.zeros(len(got), dtype=torch.bool)
    for index, (_, rows) in enumerate(batch.lengths):
        start = int(batch.first_row[index])
        span = slice(start, start + rows)
        touched[span] = True
        chosen = sure[done : done + rows]
        torch.testing.assert_close(got[span].float()[chosen], want[span][chosen], **tolerance)
        done += rows
    assert (got[~touched].float() == want[~touched]).all()  # rows of nobody


PLAIN = {"num_heads": 6, "num_kv_heads": 2, "head_size": 64, "block_size": 32}


def var_words(sequences: int, heads: int, p: float = 0.6) -> torch.Tensor:
    words = identity_words(sequences, heads)
    words[..., Field.MOVED_SHARE] = p
    words[..., Field.REQUIRE_A] = float(Tag.SINK)
    words[..., Field.REQUIRE_B] = float(Tag.IMAGE)
    words[..., Field.EXCLUDE_B] = float(Tag.SINK)
    return words


def test_moving_mass_keeps_the_sum_of_a_row():
    """With all values 1 the output is the sum of the row."""
    batch = Batch(3, torch.float32, PLAIN, [(150, 20), (40, 40), (1, 1)])
    batch.cache.view(len(batch.cache), 2, -1)[:, :, 32 * 64 :] = 1.0
    words = var_words(batch.num_sequences, 6)
    got, masses = batch.run(words, softmax_scale=0.125)
    assert ((masses[..., Mass.A] > 0) & (masses[..., Mass.B] > 0)).any()
    for index, (_, rows) in enumerate(batch.lengths):
        start = int(batch.first_row[index])
        assert (got[start : start + rows] - 1).abs().max() < 1e-5


def test_a_cache_full_of_nan_outside_the_sequences_does_no_harm():
    batch = Batch(5, torch.float32, PLAIN, [(33, 33), (64, 1)])
    got, masses = batch.run(draw_words(5, batch.num_sequences, 6), softmax_scale=0.2)
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
