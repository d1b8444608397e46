"""The `vllm.general_plugins` entry point, called once in every vLLM process.

vLLM symbols relied on: `vllm.engine.arg_utils.EngineArgs.create_engine_config`,
`ParallelConfig.worker_cls`, `SchedulerConfig.scheduler_cls` and `get_scheduler_cls`.

Without `additional_config={"headway": {...}}` an engine keeps vLLM's own worker and scheduler.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from headway.server.engine import cache_key, drain, input_processor
from headway.server.engine.config import (
    is_enabled,
    max_sgrs_requests,
    unsupported_model,
    uses_gpu_runner,
)
from headway.server.engine.geometry import check_profiles
from headway.server.engine.logs import write_as_vllm

GPU_WORKER = "headway.server.engine.gpu_worker.HeadwayGPUWorker"

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "headway.server.engine.cpu_worker.HeadwayCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": GPU_WORKER,
}
"""vLLM's worker class -> ours, which steers."""

SCHEDULERS = {
    "vllm.v1.core.sched.scheduler.Scheduler": ("headway.server.engine.scheduler.SteeringScheduler"),
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler": (
        "headway.server.engine.scheduler.AsyncSteeringScheduler"
    ),
}
"""vLLM's scheduler class -> ours, which can end one failed request."""


def register() -> None:
    """Install the seams of front end and engine core; calling it again changes nothing."""
    from vllm.engine.arg_utils import EngineArgs

    input_processor.install()
    cache_key.install()
    drain.install()
    write_as_vllm()
    original = EngineArgs.create_engine_config
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        if is_enabled(vllm_config):
            enable(vllm_config)
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config


def enable(vllm_config: Any) -> None:
    """Make an engine configuration use Headway's worker and scheduler (changed in place).

    Raises ValueError where the model, the worker or the scheduler is one Headway cannot steer, and
    for a profile or a setting that cannot be used.
    """
    reason = unsupported_model(vllm_config)
    if reason:
        name = vllm_config.model_config.model
        raise ValueError(f"Headway cannot steer {name}: {reason}")
    check_profiles(vllm_config)
    max_sgrs_requests(vllm_config)  # raises where the setting is no number
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    parallel.worker_cls = _replace(parallel.worker_cls, WORKERS, "worker")
    if parallel.worker_cls == GPU_WORKER and vllm_config.model_config.enable_sleep_mode:
        raise ValueError("Headway cannot steer an engine with sleep mode: its tables would be lost")
    if parallel.worker_cls == GPU_WORKER and not uses_gpu_runner(vllm_config):
        raise ValueError(
            "on GPU Headway steers with vLLM's V2 model runner, and vLLM chose V1: because of "
            "VLLM_USE_V2_MODEL_RUNNER=0, or of an option that V2 lacks (its log says which)"
        )
    base = scheduler.get_scheduler_cls()
    name = f"{base.__module__}.{base.__qualname__}"
    scheduler.scheduler_cls = _replace(name, SCHEDULERS, "scheduler")


def _replace(name: str, known: dict[str, str], what: str) -> str:
    if name in known.values():
        return name
    if name not in known:
        supported = ", ".join(known)
        raise ValueError(f"Headway cannot steer with the {what} {name}; it knows: {supported}")
    return known[name]
