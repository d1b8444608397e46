"""The servers of `headway bench serve`: alike in everything but Headway, all up at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from headway.benchmarks.engine import SERVER_SETTINGS
from headway.benchmarks.serve_matrix import HEADWAY, STOCK
from headway.server import launch
from headway.server.launch import LaunchError, Program, Running

PROGRAMS = {
    HEADWAY: launch.HEADWAY,
    # Not the `vllm` command, which the CPU distribution lacks the metadata for. An empty list lets
    # no plugin load.
    STOCK: Program(
        ("vllm.entrypoints.openai.api_server", "--model"), "/v1/models", {"VLLM_PLUGINS": ""}
    ),
}
MIB = 2**20


@dataclass(frozen=True)
class Order:
    """A server to start. program: key of `PROGRAMS`; flags: beside those that all have."""

    program: str
    model: Path
    log: Path
    flags: Sequence[str] = ()


class Server:
    """A server that is up, and the memory and CPU time of its processes.

    model: the name it answers to.
    """

    def __init__(self, running: Running, model: str) -> None:
        self.url = running.url
        self.model = model
        self.peak_mib = 0.0
        self._process = psutil.Process(running.pid)

    def rss_mib(self) -> float:
        """Resident memory of all its processes now, in MiB; shared pages count for each."""
        total = 0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        found = total / MIB
        self.peak_mib = max(self.peak_mib, found)
        return found

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        total = 0.0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


@contextmanager
def serving(
    orders: Mapping[str, Order], flags: Sequence[str], folder: Path, one_by_one: bool = False
) -> Iterator[dict[str, Server]]:
    """Servers by the names of their orders, started together and ended together.

    flags: of all. one_by_one: they start in turn, as on a device each measures how much memory it
    takes. Raises LaunchError if one does not start, does not end well, or is not what it should be.
    """
    with ExitStack() as stack:

        def start(order: Order) -> Server:
            running = launch.running(
                PROGRAMS[order.program],
                order.model,
                [*flags, *order.flags],
                folder,
                order.log,
                SERVER_SETTINGS,
            )
            server = Server(stack.enter_context(running), str(order.model))
            check(order.program, server.url)
            return server

        with ThreadPoolExecutor(1 if one_by_one else len(orders)) as pool:
            servers = dict(zip(orders, pool.map(start, orders.values()), strict=True))
        yield servers


def check(program: str, url: str) -> None:
    """Raise LaunchError unless Headway is in the server, or nothing of it in stock vLLM."""
    capabilities = httpx.get(f"{url}/v1/steering/capabilities").status_code
    expected = httpx.codes.OK if program == HEADWAY else httpx.codes.NOT_FOUND
    if capabilities != expected:
        message = f"answers {capabilities} for its capabilities, not {expected.value}"
        raise LaunchError(f"the {program} server {message}")
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    has_metrics = any(line.startswith("headway_") for line in lines)
    if has_metrics != (program == HEADWAY):
        found = "some" if has_metrics else "no"
        raise LaunchError(f"the {program} server has {found} metrics of Headway")
