"""Names of the vLLM modules that `seam_list.py` and `seam_attributes.py` name often."""

from __future__ import annotations

RUNNER = "vllm.v1.worker.gpu_model_runner"
SCHEDULER = "vllm.v1.core.sched.scheduler"
KV_MANAGER = "vllm.v1.core.kv_cache_manager"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
CPU_WORKER = "vllm.v1.worker.cpu_worker"
CPU_RUNNER = "vllm.v1.worker.cpu_model_runner"
BACKEND = "vllm.v1.attention.backend"
REGISTRY = "vllm.v1.attention.backends.registry"
TRITON_ATTENTION = "vllm.v1.attention.backends.triton_attn"
V2 = "vllm.v1.worker.gpu"
GPU_WORKER = "vllm.v1.worker.gpu_worker"
SAMPLER = "vllm.v1.sample.sampler"
LAYERS = "vllm.model_executor.layers"
MODELS = "vllm.model_executor.models"
