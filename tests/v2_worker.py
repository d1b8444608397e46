"""vLLM's V2 runner on CPU with Headway's GPU adapter: its kernels and vLLM's are interpreted.

Loaded in a process where `triton_cpu.install` was called. Two things differ from a GPU: vLLM's
Triton kernel that writes the KV cache insists on CUDA and is replaced by a line of torch, and the
worker is the one for CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu import model_runner

from headway.server.engine.gpu_attention import steering_backend
from headway.server.engine.gpu_runner import SteeringModelRunner
from headway.server.engine.worker_rpc import SteeringRpc


class TorchWrites(TritonAttentionImpl):
    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        block_size = kv_cache.shape[2]
        slots = slot_mapping[slot_mapping >= 0]
        rows = (slot_mapping >= 0).nonzero().flatten()
        together = torch.cat([key[rows], value[rows]], dim=-1)
        kv_cache[slots // block_size, :, slots % block_size] = together


class OnCpu(TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return TorchWrites


Backend = steering_backend(OnCpu, takes_seq_lens=True)


class V2CpuModelRunner(SteeringModelRunner, model_runner.CPUModelRunner):
    pass


class V2CpuWorker(SteeringRpc, cpu_worker.CPUWorker):
    def init_device(self) -> None:
        assert self.use_v2_model_runner
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.Backend")
        model_runner.CPUModelRunner = V2CpuModelRunner
        super().init_device()
