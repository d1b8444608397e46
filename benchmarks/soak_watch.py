"""What a server uses and holds during `headway bench soak`: memory of its processes, its metrics.

Memory is PSS, the proportional set size that Linux gives for each process: private pages, and of
every shared page the share of this process. Summed over a tree of processes it counts each page
once, where the sum of RSS would count the libraries that all have mapped for each. Where the
system does not tell it, RSS is taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from headway.benchmarks.soak_asks import Ask

MIB = 2**20
SETTLE_SECONDS = 30.0
POLL_SECONDS = 0.5
STATISTICS_SECONDS = 5.5
"""The server asks its workers for slots every 5 s; see `headway.server.http.metrics`."""
Series = tuple[str, dict[str, str]]
"""A metric and labels, summed over all others that it has."""
HELD: dict[str, Series] = {
    "slots in use": ("headway_slots", {"state": "used"}),
    "active steered requests": ("headway_active_requests", {}),
    "running requests": ("vllm:num_requests_running", {}),
    "waiting requests": ("vllm:num_requests_waiting", {}),
    "share of the KV cache in use": ("vllm:kv_cache_usage_perc", {}),
}
"""What must be 0 when nobody asks for anything."""
COUNTED: dict[str, Series] = {
    "withheld as unsteered": ("headway_unsteered_total", {}),
    "failures of steering": ("headway_failures_total", {}),
    "output tokens": ("vllm:generation_tokens_total", {}),
    "prompt tokens": ("vllm:prompt_tokens_total", {}),
    "preemptions": ("vllm:num_preemptions_total", {}),
    "tokens looked up in the prefix cache": ("vllm:prefix_cache_queries_total", {}),
    "tokens found in the prefix cache": ("vllm:prefix_cache_hits_total", {}),
}
"""What is counted; the difference between two readings is of the soak."""
Readings = dict[str, float | None]
"""By the names above; None for a metric that is not there."""


class Memory:
    """Memory of a process and all that it started, in MiB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.kind = "PSS"
        try:
            self._process.memory_full_info().pss  # noqa: B018
        except (psutil.AccessDenied, AttributeError):
            self.kind = "RSS"

    def mib(self) -> float:
        """Now. Processes that end meanwhile count nothing."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            for process in (self._process, *self._process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    full = self.kind == "PSS"
                    total += process.memory_full_info().pss if full else process.memory_info().rss
        return total / MIB


async def sample_forever(memory: Memory, every: float, samples: list[tuple[float, float]]) -> None:
    """Append (seconds from now, MiB) every so many seconds, until it is cancelled."""
    started = time.perf_counter()
    while True:
        # Reading it walks the page tables: milliseconds, which requests are not to wait for.
        used = await asyncio.to_thread(memory.mib)
        samples.append((time.perf_counter() - started, used))
        await asyncio.sleep(every)


def listening_pid(port: int) -> int | None:
    """The oldest process of this machine that listens on a TCP port; None if none is seen."""
    pids = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                    pids.add((process.create_time(), process.pid))
    return min(pids)[1] if pids else None


def readings(text: str) -> Readings:
    """What is held and counted, from the text of /metrics."""
    wanted = HELD | COUNTED
    found: Readings = dict.fromkeys(wanted)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for name, (metric, labels) in wanted.items():
                if sample.name == metric and labels.items() <= sample.labels.items():
                    found[name] = (found[name] or 0.0) + sample.value
    return found


async def read(http: httpx.AsyncClient) -> Readings:
    """`readings` of a server now. Raises httpx.HTTPError."""
    response = await http.get("/metrics")
    response.raise_for_status()
    return readings(response.text)


async def settled(http: httpx.AsyncClient, last: Ask) -> Readings:
    """Readings once nothing is held any more, or those that are there after `SETTLE_SECONDS`.

    last: a short steered request. Raises httpx.HTTPError. vLLM's gauges are those of the last step
    of the engine, in which a request that was aborted since may have run, and slots are asked for
    only after steered requests; so a steered and an unsteered request come last.
    """
    deadline = time.perf_counter() + SETTLE_SECONDS
    found = await read(http)
    while found["active steered requests"] and time.perf_counter() < deadline:
        await asyncio.sleep(POLL_SECONDS)
        found = await read(http)
    steered: Mapping[str, object] = last.body
    unsteered = {name: value for name, value in steered.items() if name != "steering"}
    for each in (steered, unsteered):
        (await http.post(last.path, json=each)).raise_for_status()
    await asyncio.sleep(STATISTICS_SECONDS)
    found = await read(http)
    while any(found[name] for name in HELD) and time.perf_counter() < deadline:
        await asyncio.sleep(POLL_SECONDS)
        found = await read(http)
    return found
