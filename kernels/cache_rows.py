"""Keys and values of whole sequences, taken out of vLLM's paged CPU cache.

Layout of the cache: see `segment_attention.py`.
"""

from __future__ import annotations

import torch


def cache_rows(kv_cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, transposed, and values of some sequences.

    kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size]; blocks: int64 [num_sequences,
    blocks per sequence]. Returns keys [num_sequences, num_kv_heads, head_size, num_keys] and values
    [num_sequences, num_kv_heads, num_keys, head_size], in the dtype of the cache.
    """
    _, heads, block_size, width = kv_cache.shape
    count, per_sequence = blocks.shape
    size = width // 2
    taken = kv_cache.index_select(0, blocks.flatten()).view(count, per_sequence, heads, 2, -1)
    key = taken[:, :, :, 0].view(count, per_sequence, heads, size, block_size)
    value = taken[:, :, :, 1].view(count, per_sequence, heads, block_size, size)
    return (
        key.permute(0, 2, 3, 1, 4).reshape(count, heads, size, per_sequence * block_size),
        value.permute(0, 2, 1, 3, 4).reshape(count, heads, per_sequence * block_size, size),
    )
