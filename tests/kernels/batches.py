"""Drawn batches, head words and tags for the tests of the attention kernels."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from headway.kernels.head_word import Field, Mass, Tag
from headway.kernels.reference import segment_attention_reference

TAGS = [0, Tag.IMAGE, Tag.SINK, Tag.EMPHASISED, Tag.IMAGE | Tag.SINK, Tag.OUTPUT]


class Batch:
    """Ragged sequences in a paged cache of shuffled blocks, everything that is unused being NaN.

    layout of the cache: `vec` is vLLM's on CPU, `nhd` and `hnd` are those on GPU, which differ in
    strides only.
    """

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        shape: dict,
        lengths: list[tuple[int, int]],
        layout: str = "vec",
    ):
        draw = torch.Generator().manual_seed(seed)
        heads, kv_heads, size = shape["num_heads"], shape["num_kv_heads"], shape["head_size"]
        block_size = self.block_size = shape["block_size"]
        self.lengths = lengths
        blocks = [-(-length // block_size) for length, _ in lengths]
        free = torch.randperm(sum(blocks) + 5, generator=draw).int()
        self.cache = torch.full((len(free), kv_heads, block_size, 2 * size), torch.nan, dtype=dtype)
        if layout == "nhd":
            self.cache = self.cache.transpose(1, 2).contiguous().transpose(1, 2)
        self.block_table = torch.full((len(lengths), max(blocks) + 1), -(10**6), dtype=torch.int32)
        self.keys, self.values = [], []
        for index, ((length, _), count) in enumerate(zip(lengths, blocks, strict=True)):
            self.block_table[index, :count], free = free[:count], free[count:]
            key = torch.randn(length, kv_heads, size, generator=draw).to(dtype)
            value = torch.randn(length, kv_heads, size, generator=draw).to(dtype)
            for position in range(length):
                block = int(self.block_table[index, position // block_size])
                offset = position % block_size
                if layout == "vec":
                    halves = self.cache[block].view(kv_heads, 2, block_size * size)
                    halves[:, 0].view(kv_heads, size, block_size)[:, :, offset] = key[position]
                    halves[:, 1].view(kv_heads, block_size, size)[:, offset] = value[position]
                else:
                    self.cache[block, :, offset, :size] = key[position]
                    self.cache[block, :, offset, size:] = value[position]
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
