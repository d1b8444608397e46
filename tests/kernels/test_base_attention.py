"""The identity word against vLLM's own CPU kernel: windows, caps and layouts mean the same."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops

from headway.kernels.segment_attention import Sequences, segment_attention
from tests.kernels.test_segment_attention import identity_words

pytestmark = pytest.mark.unit

LENGTHS, ROWS = [300, 77, 130], [1, 77, 40]
BLOCK_SIZE, KV_HEADS = 32, 2


def vllm_attention(query, keys, values, tables, window: int, cap: float, dtype):
    """Fill a paged cache as vLLM does and attend with its kernel: output and cache."""
    head_size = query.shape[-1]
    cache = torch.zeros(32, KV_HEADS, BLOCK_SIZE, 2 * head_size, dtype=dtype)
    halves = cache.view(32, KV_HEADS, 2 * BLOCK_SIZE, head_size).chunk(2, dim=2)
    for key, value, table in zip(keys, values, tables, strict=True):
        position = torch.arange(len(key))
        slots = table[position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        scales = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
        ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, "vec", **scales)
    starts = torch.tensor([0, *ROWS]).cumsum(0).int()
    lengths = torch.tensor(LENGTHS).int()
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(LENGTHS),
        num_heads=query.shape[1],
        num_kv_heads=KV_HEADS,
        head_dim=head_size,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=window,
        isa="vec",
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    output = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=halves[0],
        value_cache=halves[1],
        output=output,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=0.2,
        causal=True,
        alibi_slopes=None,
        sliding_window=window,
        block_table=torch.stack(tables),
        softcap=cap,
        scheduler_metadata=metadata,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return output, cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "cap"), [(-1, 0.0), (33, 0.0), (-1, 3.0), (64, 5.0)])
@pytest.mark.parametrize(("heads", "head_size"), [(6, 64), (2, 128)])
def test_the_identity_word_is_vllms_attention(dtype, window, cap, heads, head_size):
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    query = drawn(sum(ROWS), heads, head_size)
    keys = [drawn(length, KV_HEADS, head_size) for length in LENGTHS]
    values = [drawn(length, KV_HEADS, head_size) for length in LENGTHS]
    tables = list(torch.randperm(32, generator=draw)[:30].view(3, 10).int())
    want, cache = vllm_attention(query, keys, values, tables, window, cap, dtype)
    rows = torch.tensor(ROWS)
    none = torch.full((3,), -1, dtype=torch.int32)
    sequences = Sequences(
        first_row=(rows.cumsum(0) - rows).int(),
        num_rows=rows.int(),
        position=(torch.tensor(LENGTHS) - rows).int(),
        prompt_len=torch.tensor(LENGTHS).int(),
        table_row=torch.arange(3).int(),
        tag_row=none,
        mass_row=none,
    )
    got = torch.empty_like(query)
    words = identity_words(3, heads)
    segment_attention(query, cache, got, torch.stack(tables), sequences, words, 0.2, cap, window)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
