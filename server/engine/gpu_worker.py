"""Seam: vLLM's GPU worker, which builds the V2 runner.

vLLM symbols relied on: `vllm.v1.worker.gpu_worker.Worker` (`init_device`, `_make_model_runner`,
`compile_or_warm_up_model`), `vllm.v1.worker.gpu.model_runner.GPUModelRunner`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from headway.server.engine import gpu_attention
from headway.server.engine.gpu_runner import SteeringModelRunner
from headway.server.engine.worker_rpc import SteeringRpc


class SteeringGPUModelRunner(SteeringModelRunner, GPUModelRunner):
    """vLLM's V2 runner, which also keeps the steered requests and plans every step."""


class HeadwayGPUWorker(SteeringRpc, Worker):
    """vLLM's GPU worker with the steering runner."""

    def init_device(self) -> None:
        """Build vLLM's device and runner, the runner and the attention backends being ours."""
        gpu_attention.install()
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        """Compile Headway's kernels before vLLM captures its graphs."""
        self.model_runner.warm_up_steering()
        return super().compile_or_warm_up_model()

    def _make_model_runner(self) -> Any:
        return SteeringGPUModelRunner(self.vllm_config, self.device)
