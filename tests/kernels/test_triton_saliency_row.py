"""The Triton saliency kernels against autograd, on paged caches full of NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.saliency_row import saliency_row_reference
from headway.kernels.triton import saliency_row
from headway.kernels.triton.saliency_row import saliency_rows

pytestmark = pytest.mark.unit

NO_BLOCK = 2**30


class Paged:
    """Sequences of random keys and values, in shuffled blocks of a cache that is NaN elsewhere."""

    def __init__(
        self,
        seq_lens: list[int],
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        layout: str = "NHD",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-length // block_size) for length in seq_lens]
        num_blocks = sum(blocks) + 2
        shape = [num_blocks, num_kv_heads, block_size, 2 * head_size]
        if layout == "NHD":
            shape[1], shape[2] = shape[2], shape[1]
        cache = torch.full(shape, float("nan"), dtype=dtype)
        self.kv_cache = cache.transpose(1, 2) if layout == "NHD" else cache
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        self.block_table = torch.full((len(seq_lens), max(blocks) + 1), NO_BLOCK, dtype=torch.int32)
        self.keys, self.values = [], []
        free = torch.randperm(num_blocks, generator=generator).tolist()
        for row, length in enumerate(seq_lens):
            pair = torch.randn(length, num_kv_heads, 2 * head_size, generator=generator).to(dtype)
            self.keys.append(pair[..., :head_size])
            self.values.append(pair[..., head_size:])
            for position in range(length):
                if position % block_size == 0:
                    self.block_table[row, position // block_size] = free.pop()
                block = self.block_table[row, position // block_size]
                self.kv_cache[block, :, position % block_size] = pair[position]


def rows_of(
    paged: Paged, query: torch.Tensor, grad_output: torch.Tensor, scale: float, max_len: int
) -> torch.Tensor:
    batch, num_candidates, num_heads, _ = grad_output.shape
    saliency = torch.full((batch, num_candidates, max_len), float("nan"))
    lse = torch.full((batch, num_heads), float("nan"))
    saliency_rows(
        saliency,
        query,
        grad_output,
        paged.kv_cache,
        paged.block_table,
        paged.seq_lens,
        scale,
        lse,
    )
    return saliency


@settings(max_examples=12, deadline=None)
@given(
    seq_lens=st.lists(st.sampled_from([0, 1, 5, 32, 33, 140]), min_size=1, max_size=2),
    num_kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    num_candidates=st.sampled_from([1, 2, 5]),
    head_size=st.sampled_from([8, 20, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    float32_grad=st.booleans(),
    layout=st.sampled_from(["NHD", "HND"]),
    block_size=st.sampled_from([8, 16, 24]),
    small_tiles=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_autograd(
    seq_lens,
    num_kv_heads,
    group,
    num_candidates,
    head_size,
    dtype,
    float32_grad,
    layout,
    block_size,
    small_tiles,
    seed,
):
    paged = Paged(seq_lens, num_kv_heads, head_size, dtype, block_size, layout, seed)
    generator = torch.Generator().manual_seed(seed)
    batch, num_heads = len(seq_lens), num_kv_heads * group
    query = 2 * torch.randn(batch, num_heads, head_size, generator=generator).to(dtype)
    grad_output = torch.randn(batch, num_candidates, num_heads, head_size, generator=generator)
    grad_output = grad_output if float32_grad else grad_output.to(dtype)
    scale, max_len = head_size**-0.5, max(seq_lens) + 3
    with pytest.MonkeyPatch.context() as patch:
        if small_tiles:
            patch.setattr(saliency_row, "LSE_TILE", 1024)
            patch.setattr(saliency_row, "SALIENCY_TILE", 512)
        saliency = rows_of(paged, query, grad_output, scale, max_len)
    for row, length in enumerate(seq_lens):
        assert torch.equal(saliency[row, :, length:], torch.zeros(num_candidates, max_len - length))
        if length:
            expected = saliency_row_reference(
                query[row], paged.keys[row], paged.values[row], grad_output[row], scale
            )
            torch.testing.assert_close(saliency[row, :, :length], expected, rtol=1e-4, atol=1e-6)


def test_one_key_has_all_the_weight():
    paged = Paged([1], num_kv_heads=1, head_size=8)
    grad_output = torch.randn(1, 2, 1, 8)
    saliency = rows_of(paged, torch.randn(1, 1, 8), grad_output, 1.0, max_len=1)
    expected = (grad_output[0, :, 0] @ paged.values[0][0, 0]).abs()
    torch.testing.assert_close(saliency[0, :, 0], expected)


def test_large_logits_do_not_overflow(monkeypatch):
    monkeypatch.setattr(saliency_row, "LSE_TILE", 64)  # 8 keys
    paged = Paged([40], num_kv_heads=1, head_size=8)
    query, grad_output = torch.randn(1, 1, 8), torch.randn(1, 1, 1, 8)
    saliency = rows_of(paged, query, grad_output, 1000.0, max_len=40)
    expected = saliency_row_reference(
        query[0], paged.keys[0], paged.values[0], grad_output[0], 1000.0
    )
    torch.testing.assert_close(saliency[0], expected, rtol=1e-3, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    paged = Paged([4], num_kv_heads=2, head_size=8)
    with pytest.raises(ValueError, match="grad_output"):
        rows_of(paged, torch.zeros(1, 2, 8), torch.zeros(1, 1, 3, 8), 1.0, max_len=4)
    with pytest.raises(ValueError, match="kv_cache"):
        rows_of(paged, torch.zeros(1, 3, 8), torch.zeros(1, 1, 3, 8), 1.0, max_len=4)
