"""Keys and values taken out of the paged cache, against its layout and vLLM's own writing."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops

from headway.kernels.cache_rows import cache_rows
from tests.kernels.batches import Batch

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.bfloat16)
NUM_BLOCKS, KV_HEADS, BLOCK_SIZE = 9, 3, 32


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def number(kv_cache: torch.Tensor, block: int, head: int, which: str, offset: int, dim: int):
    """One number of a key or value, by the layout that `segment_attention.py` documents."""
    _, _, block_size, width = kv_cache.shape
    size = width // 2
    numbers = kv_cache[block, head].flatten()
    keys, values = numbers[: block_size * size], numbers[block_size * size :]
    if which == "key":
        return keys.view(size, block_size)[dim, offset]
    return values.view(block_size, size)[offset, dim]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "size"), [(4, 6), (6, 4), (5, 5), (1, 3)])
def test_every_number_is_where_the_layout_says(dtype, block_size, size):
    kv_cache = drawn(5, 2, block_size, 2 * size, dtype=dtype)
    blocks = torch.tensor([[3, 0], [1, 4], [3, 3]])
    key, value = cache_rows(kv_cache, blocks)
    assert key.shape == (3, 2, size, 2 * block_size)
    assert value.shape == (3, 2, 2 * block_size, size)
    assert key.dtype is value.dtype is dtype
    for sequence in range(3):
        for head in range(2):
            for position in range(2 * block_size):
                block = int(blocks[sequence, position // block_size])
                at = kv_cache, block, head
                for dim in range(size):
                    offset = position % block_size
                    assert key[sequence, head, dim, position] == number(*at, "key", offset, dim)
                    assert value[sequence, head, position, dim] == number(*at, "value", offset, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 80])
def test_what_vllm_wrote_is_read(dtype, size):
    """Two sequences of 70 and 33 tokens; what lies beyond their ends is not looked at."""
    kv_cache = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * size), torch.nan, dtype=dtype)
    halves = kv_cache.view(NUM_BLOCKS, KV_HEADS, 2 * BLOCK_SIZE, size).chunk(2, dim=2)
    lengths, blocks = [70, 33], torch.tensor([[7, 2, 5], [0, 8, 0]])
    scales = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
    written = []
    for sequence, length in enumerate(lengths):
        keys = drawn(length, KV_HEADS, size, dtype=dtype, seed=sequence)
        values = drawn(length, KV_HEADS, size, dtype=dtype, seed=sequence + 2)
        position = torch.arange(length)
        slots = blocks[sequence][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, "vec", **scales)
        written.append((keys, values))
    key, value = cache_rows(kv_cache, blocks)
    for sequence, (keys, values) in enumerate(written):
        length = lengths[sequence]
        assert torch.equal(key[sequence, :, :, :length].permute(2, 0, 1), keys)
        assert torch.equal(value[sequence, :, :length].transpose(0, 1), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_of_the_attention_tests_is_read(dtype):
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "block_size": 32}
    batch = Batch(3, dtype, shape, [(65, 1), (31, 1), (96, 1)])
    for index, (length, _) in enumerate(batch.lengths):
        blocks = batch.block_table[index, : -(-length // 32)].long()
        key, value = cache_rows(batch.cache, blocks[None])
        assert torch.equal(key[0, :, :, :length].permute(2, 0, 1), batch.keys[index])
        assert torch.equal(value[0, :, :length].transpose(0, 1), batch.values[index])
        assert key[0, :, :, length:].isnan().all() and value[0, :, length:].isnan().all()


def test_the_cache_is_copied():
    """What is read must not change when the next step writes the cache."""
    kv_cache = drawn(2, 1, 4, 8, dtype=torch.float32)
    for blocks in ([[1]], [[0, 1]]):
        key, value = cache_rows(kv_cache, torch.tensor(blocks))
        kept = key.clone(), value.clone()
        kv_cache.add_(1.0)
        assert torch.equal(key, kept[0]) and torch.equal(value, kept[1])
