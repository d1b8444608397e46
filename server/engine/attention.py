"""Seam: the output of attention on vLLM's CPU backend.

vLLM symbols relied on: `vllm.v1.attention.backends.cpu_attn` (`CPUAttentionBackend`,
`CPUAttentionBackendImpl.forward` with `layer.layer_name` and the `output` it writes),
`register_backend` and `AttentionBackendEnum.CPU_ATTN`,
`vllm.model_executor.models.utils.extract_layer_index`.

The base kernel computes every row as it always does; rows of steered requests are then edited in
place. vLLM calls attention through an opaque custom op, so that compiled models pass here too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from headway.server.engine.step_plan import current


class SteeringCPUAttentionImpl(CPUAttentionBackendImpl):
    """CPU attention with an epilogue for the rows of steered requests."""

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = super().forward(layer, *args, **kwargs)
        plan = current.plan
        if plan is not None and self.attn_type == AttentionType.DECODER:
            plan.edit_head_outputs(layer_index(layer.layer_name), kwargs["output"])
        return result


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
