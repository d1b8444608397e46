"""The engine processes that are compared: alike in everything but Headway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from headway.benchmarks.scenarios import Scenario

SETTINGS = {
    # One process per engine, so that every cost of a request is in the measured path.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every engine."""

KEEP_MEMORY = {
    # glibc's malloc gives large pieces back to the system until the process has freed one as large;
    # from then on it keeps them, up to 32 MiB each. Prompts cost 8 % less CPU time after that, so
    # that an engine with more behind it would pass for the faster one. This has it so from the
    # start. Larger pieces (logits of a whole prompt) still go back: kept, they cut the heap up, and
    # a server's memory grew by a third within ten minutes.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
}
"""Environment of every process that is measured on CPU."""

CPU_SETTINGS = {
    **KEEP_MEMORY,
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
    # Set by hand, or vLLM would decide it by what else it finds in the process.
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
}
"""The same of an engine on CPU."""

SERVER_SETTINGS = {
    **KEEP_MEMORY,
    # No core for the HTTP server alone: it has little to do, and two cores are common.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
}
"""Environment of `headway serve` on CPU, where it answers one benchmark alone."""

DEVICE_MEMORY = 0.9
"""Share of a CUDA device's memory for all engines together. vLLM does not count what the rest is
for: a CUDA context for each, and Headway's sink tags."""


def settings(on_cuda: bool) -> dict[str, str]:
    """Environment of an engine on a CUDA device, or on CPU."""
    return SETTINGS if on_cuda else SETTINGS | CPU_SETTINGS


def server_settings() -> dict[str, str]:
    """`SERVER_SETTINGS` as a server has them: what the caller's environment sets is left alone."""
    return {name: os.environ.get(name, value) for name, value in SERVER_SETTINGS.items()}


class EngineError(RuntimeError):
    """An engine process ended or answered nonsense."""


def ask(process: subprocess.Popen[str], line: str) -> str:
    """The line that a process answers to one on its stdin; empty if it has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


def end(process: subprocess.Popen[str]) -> None:
    """End a process that reads lines until its stdin is closed; by force after 20 seconds."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # of what one that is gone has not read
        process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Engine:
    """The process of scenarios that share one. Start it, wait until `ready`, `run`, `close`.

    memory: its share of the CUDA device's memory; None: it runs on CPU.
    """

    def __init__(
        self, scenarios: Sequence[Scenario], model: Path, log: Path, memory: float | None = None
    ) -> None:
        self.names = [scenario.name for scenario in scenarios]
        self.log = log
        # An empty list lets no plugin load: the engine is vLLM alone.
        plugins = "headway" if scenarios[0].headway else ""
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "headway.benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **settings(memory is not None), "VLLM_PLUGINS": plugins},
                cwd=log.parent,
                text=True,
            )
        loads = list(map(asdict, scenarios))
        self._send({"scenarios": loads, "model": str(model), "memory": memory})

    def ready(self) -> dict[str, Any]:
        """Wait until the engine is up and has served each load once; what it verified of each."""
        return self._receive()

    def run(self, name: str) -> dict[str, float]:
        """Serve the load of a scenario once: tokens, seconds and CPU seconds."""
        self._send({"run": name})
        return self._receive()

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, in seconds."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End the process."""
        end(self.process)

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._error() from None

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._error()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _error(self) -> EngineError:
        tail = self.log.read_text()[-3000:]
        return EngineError(
            f"the engine of {', '.join(self.names)} ended; the end of its log:\n{tail}"
        )
