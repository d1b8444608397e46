"""Products with the paged cache against sums in float64, and the invariants of their bits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import cache_products as module
from headway.kernels.cache_products import CacheProducts, CacheProductsError
from tests.kernels.threads import threads

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = ("with_keys", "with_values", "mix_keys", "mix_values")
# Odd sizes, and around the 8 and 32 numbers, the 4 rows and the 256 keys that go together.
BLOCK_SIZES = st.sampled_from([1, 3, 8, 16, 20, 32, 33, 128, 300])
HEAD_SIZES = st.sampled_from([1, 6, 8, 15, 32, 50, 64])
LENGTHS = st.lists(st.sampled_from([1, 2, 7, 31, 32, 33, 100, 255, 256, 257, 600]), max_size=4)
SEEDS = st.integers(0, 10**6)


@dataclass(frozen=True)
class Sequences:
    """Sequences of random keys and values; NaN in whatever no sequence has in the cache."""

    kv_cache: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor
    keys: list[torch.Tensor]
    """[length, num_kv_heads, head_size] of every sequence, and so are the values."""
    values: list[torch.Tensor]

    def products(self, rows: slice | list[int] = slice(None)) -> CacheProducts:
        return CacheProducts(self.kv_cache, self.blocks[rows], self.lengths[rows])

    def vectors(self, operation: str, heads: int, count: int, seed: int = 0) -> torch.Tensor:
        """Vectors to multiply by; those that mix are NaN at padding, which is not read."""
        width = int(self.lengths.max()) if "mix" in operation else self.keys[0].shape[2]
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(self.lengths), heads, count, width, generator=generator)
        if "mix" in operation:
            for row, length in enumerate(self.lengths):
                x[row, ..., length:] = torch.nan
        return x


def stored(
    seed: int,
    lengths: list[int],
    dtype: torch.dtype,
    num_kv_heads: int = 3,
    block_size: int = 32,
    head_size: int = 64,
) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    per_row = [-(-length // block_size) for length in lengths]
    num_blocks = sum(per_row) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    shape = num_blocks, num_kv_heads, block_size, 2 * head_size
    kv_cache = torch.full(shape, torch.nan, dtype=dtype)
    numbers = kv_cache.view(num_blocks, num_kv_heads, -1)
    half = block_size * head_size
    key_blocks = numbers[..., :half].view(num_blocks, num_kv_heads, head_size, block_size)
    value_blocks = numbers[..., half:].view(num_blocks, num_kv_heads, block_size, head_size)
    blocks = torch.full((len(lengths), max(per_row) + 1), -(2**40))
    keys, values = [], []
    for row, length in enumerate(lengths):
        key, value = torch.randn(2, length, num_kv_heads, head_size, generator=generator).to(dtype)
        for position in range(length):
            if position % block_size == 0:
                blocks[row, position // block_size] = free.pop()
            block, offset = int(blocks[row, position // block_size]), position % block_size
            key_blocks[block, :, :, offset] = key[position]
            value_blocks[block, :, offset] = value[position]
        keys.append(key)
        values.append(value)
    return Sequences(kv_cache, blocks, torch.tensor(lengths), keys, values)


def assert_products(result: torch.Tensor, sequences: Sequences, operation: str, x: torch.Tensor):
    """Stored numbers are widened exactly, so that all that is lost is lost in float32 sums."""
    assert result.dtype is torch.float32 and result.is_contiguous()
    num_keys, head_size = int(sequences.lengths.max()), sequences.keys[0].shape[2]
    assert result.shape == (*x.shape[:3], head_size if "mix" in operation else num_keys)
    stored = sequences.keys if "keys" in operation else sequences.values
    for row, length in enumerate(sequences.lengths.tolist()):
        group = x.shape[1] // stored[row].shape[1]
        matrix = stored[row].double().permute(1, 2, 0).repeat_interleave(group, dim=0)
        factors = x[row].double()
        if "mix" in operation:
            matrix, factors = matrix.transpose(1, 2), factors[..., :length]
            of_row = result[row]
        else:
            assert (result[row, ..., length:] == 0).all()
            of_row = result[row, ..., :length]
        tolerance = 1e-6 * (factors.abs() @ matrix.abs())
        assert ((of_row - factors @ matrix).abs() <= tolerance).all()


@pytest.fixture(params=[True, False], ids=["kernel", "torch"])
def either(request, monkeypatch) -> bool:
    """Both with the kernel, which is there, and as where it was not built."""
    assert module.library() is not None
    if not request.param:
        monkeypatch.setattr(module, "library", lambda: None)
    return request.param


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(
    seed=SEEDS,
    lengths=LENGTHS.filter(len),
    block_size=BLOCK_SIZES,
    head_size=HEAD_SIZES,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    count=st.integers(1, 5),
)
def test_equals_the_sums(
    operation, dtype, seed, lengths, block_size, head_size, kv_heads, group, count
):
    sequences = stored(seed, lengths, dtype, kv_heads, block_size, head_size)
    x = sequences.vectors(operation, kv_heads * group, count, seed)
    result = getattr(sequences.products(), operation)(x)
    assert_products(result, sequences, operation, x)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_torch_and_the_kernel_agree(either, block_size, dtype, operation):
    sequences = stored(1, [130, 600, 1, 64], dtype, block_size=block_size)
    x = sequences.vectors(operation, 9, 5)
    products = sequences.products()
    assert (products.num_keys, products.num_kv_heads, products.head_size) == (600, 3, 64)
    for _ in range(2):
        assert_products(getattr(products, operation)(x), sequences, operation, x)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, lengths=LENGTHS.filter(len), block_size=BLOCK_SIZES, data=st.data())
def test_a_row_has_the_same_bits_in_any_company(operation, dtype, seed, lengths, block_size, data):
    sequences = stored(seed, lengths, dtype, 2, block_size, 20)
    x = sequences.vectors(operation, 4, 2, seed)
    together = getattr(sequences.products(), operation)(x)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    chosen = sequences.products(rows)
    width = chosen.num_keys if "mix" in operation else 20
    result = getattr(chosen, operation)(x[rows][..., :width])
    assert torch.equal(result, together[rows][..., : result.shape[3]])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype, operation):
    sequences = stored(2, [600, 77, 1000], dtype)
    x = sequences.vectors(operation, 9, 3)
    with threads(1):
        alone = getattr(sequences.products(), operation)(x)
    with threads(2):
        assert torch.equal(getattr(sequences.products(), operation)(x), alone)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tensors_may_be_parts_of_others(either, operation):
    sequences = stored(3, [100, 40], torch.bfloat16)
    x = sequences.vectors(operation, 6, 2)
    expected = getattr(sequences.products(), operation)(x)
    kv_cache = sequences.kv_cache.repeat(1, 2, 1, 1)[:, :3]
    blocks = sequences.blocks.T.contiguous().T
    products = CacheProducts(kv_cache, blocks, sequences.lengths.repeat_interleave(2)[::2])
    apart = x.repeat(1, 1, 1, 2)[..., : x.shape[3]].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(getattr(products, operation)(apart), expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_cache_is_not_copied(operation):
    """What is written to the cache between two products is seen by the second."""
    sequences = stored(4, [50], torch.float32)
    x, products = sequences.vectors(operation, 3, 1), sequences.products()
    first = getattr(products, operation)(x)
    sequences.kv_cache.mul_(2.0)
    assert torch.equal(getattr(products, operation)(x), 2.0 * first)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_to_multiply(either, operation):
    sequences = stored(5, [50, 20], torch.float32)
    width = 50 if "mix" in operation else 64
    result = getattr(sequences.products(), operation)(torch.ones(2, 3, 0, width))
    assert result.shape == (2, 3, 0, 64 if "mix" in operation else 50)
    nobody = CacheProducts(sequences.kv_cache, sequences.blocks[:0], sequences.lengths[:0])
    assert nobody.num_keys == 0
    x = torch.ones(0, 3, 1, 0 if "mix" in operation else 64)
    assert getattr(nobody, operation)(x).numel() == 0


CACHE, BLOCKS, LENGTHS_OF_TWO = torch.ones(4, 2, 8, 12), torch.zeros(2, 3).long(), [20, 24]


@pytest.mark.parametrize(
    "kv_cache, blocks, lengths, message",
    [
        (CACHE.double(), BLOCKS, LENGTHS_OF_TWO, "got torch.float64"),
        (CACHE[0], BLOCKS, LENGTHS_OF_TWO, r"got \[2, 8, 12\]"),
        (torch.ones(4, 2, 8, 11), BLOCKS, LENGTHS_OF_TWO, r"got \[4, 2, 8, 11\]"),
        (CACHE[:, :, :4].transpose(2, 3), BLOCKS, LENGTHS_OF_TWO, "dense blocks"),
        (CACHE, BLOCKS.int(), LENGTHS_OF_TWO, "must be int64"),
        (CACHE, BLOCKS, [20.0, 24.0], "must be int64"),
        (CACHE.to("meta"), BLOCKS, LENGTHS_OF_TWO, "one device"),
        (CACHE, BLOCKS[0], LENGTHS_OF_TWO, r"got \[3\] and \[2\]"),
        (CACHE, BLOCKS, [20], r"got \[2, 3\] and \[1\]"),
        (CACHE, BLOCKS, [0, 24], r"in 1 .. 24: \[0, 24\]"),
        (CACHE, BLOCKS, [20, 25], r"in 1 .. 24: \[20, 25\]"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(kv_cache, blocks, lengths, message):
    with pytest.raises(CacheProductsError, match=message):
        CacheProducts(kv_cache, blocks, torch.tensor(lengths))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vectors_that_do_not_fit_are_refused(either, operation):
    products = CacheProducts(CACHE, BLOCKS, torch.tensor(LENGTHS_OF_TWO))
    width = 24 if "mix" in operation else 6
    for x, message in (
        (torch.ones(2, 4, 1, width).double(), "must be float32"),
        (torch.ones(2, 4, 1, width, device="meta"), "device of the cache"),
        (torch.ones(2, 4, width), rf"got \[2, 4, {width}\]"),
        (torch.ones(3, 4, 1, width), rf"\[2, num_heads, num_vectors, {width}\]"),
        (torch.ones(2, 4, 1, width + 1), rf"got \[2, 4, 1, {width + 1}\]"),
        (torch.ones(2, 3, 1, width), "3 heads cannot share 2 KV heads"),
    ):
        with pytest.raises(CacheProductsError, match=message):
            getattr(products, operation)(x)


@pytest.mark.parametrize("block", [-1, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_blocks_that_are_not_there_are_refused(either, operation, block):
    blocks = BLOCKS.clone()
    blocks[1, 2] = block
    x = torch.ones(2, 4, 1, 24 if "mix" in operation else 6)
    with pytest.raises(CacheProductsError, match=r"blocks must be in 0 .. 3"):
        getattr(CacheProducts(CACHE, blocks, torch.tensor(LENGTHS_OF_TWO)), operation)(x)
