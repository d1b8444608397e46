"""Seam: the output of attention on vLLM's CPU backend.

vLLM symbols relied on: `vllm.v1.attention.backends.cpu_attn` (`CPUAttentionBackend`,
`CPUAttentionBackendImpl.forward` with `layer.layer_name` and the `output` it writes, its fields
`scale`, `logits_soft_cap`, `sliding_window`, and `CPUAttentionMetadata`), `register_backend` and
`AttentionBackendEnum.CPU_ATTN`,
`vllm.model_executor.models.utils.extract_layer_index`.

Rows of unsteered requests, and of steered ones at layers that they do not edit, come from the base
kernel. Rows whose attention weights are edited come from Headway's kernel, over the same cache; the
base kernel is spared them through the sequence lengths it is given. Head outputs are then scaled
and shifted in place. vLLM calls attention through an opaque custom op, so that compiled models pass
here too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from headway.server.engine.attention_layout import AttentionCall
from headway.server.engine.step_plan import current


class SteeringCPUAttentionImpl(CPUAttentionBackendImpl):
    """CPU attention with the edits of steered requests."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        def base(seq_lens: torch.Tensor | None) -> None:
            metadata = attn_metadata
            if seq_lens is not None:
                metadata = replace(attn_metadata, seq_lens=seq_lens)
            super(SteeringCPUAttentionImpl, self).forward(
                layer, query, key, value, kv_cache, metadata, output, *args, **kwargs
            )

        plan = current.plan
        if plan is None or attn_metadata is None or self.attn_type != AttentionType.DECODER:
            base(None)
            return output
        index = layer_index(layer.layer_name)
        if plan.attends(index):
            plan.edit_attention(index, self._call(query, kv_cache, output, attn_metadata), base)
        else:
            base(None)
        plan.edit_head_outputs(index, output)
        return output

    def _call(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        attn_metadata: Any,
    ) -> AttentionCall:
        shape = len(query), self.num_heads, self.head_size
        return AttentionCall(
            query.view(shape),
            kv_cache,
            output.view(shape),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.slot_mapping,
            self.scale,
            self.logits_soft_cap,
            self.sliding_window,
        )


class SteeringCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with the implementation above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SteeringCPUAttentionImpl


@lru_cache(maxsize=4096)
def layer_index(layer_name: str) -> int:
    """Index of the decoder layer that an attention layer's name tells, 0-based."""
    return extract_layer_index(layer_name)


def install() -> None:
    """Have vLLM build CPU attention layers with the steering implementation."""
    backend = SteeringCPUAttentionBackend
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__qualname__}")
