"""Seam: the output of attention on vLLM's CPU backend.

vLLM symbols relied on: `vllm.v1.attention.backends.cpu_attn` (`CPUAttentionBackend`,
`CPUAttentionBackendImpl.forward`, its fields `scale`, `logits_soft_cap`, `sliding_window`, and
`CPUAttentionMetadata`), `register_backend` and `AttentionBackendEnum.CPU_ATTN`.
"""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from headway.server.engine.attention import SteeringAttention


class SteeringCPUAttentionImpl(SteeringAttention, CPUAttentionBackendImpl):
    """CPU attention with the edits of steered requests."""


class SteeringCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with the implementation above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SteeringCPUAttentionImpl


def install() -> None:
    """Have vLLM build CPU attention layers with the steering implementation."""
    backend = SteeringCPUAttentionBackend
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__qualname__}")
