"""What the workers' statistics look like on /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Histogram, generate_latest
from vllm.config import ParallelConfig

from headway.server.engine.statistics import BUCKETS, StepSeconds
from headway.server.http import metrics
from headway.server.http.metrics import WorkerStatistics
from headway.server.http.plugin import poll_statistics

pytestmark = pytest.mark.unit

COUNTS = [2, 3, 1, *[0] * 9]


def worker(used: int = 3, free: int = 29, counts: Any = COUNTS, seconds: float = 0.75) -> Any:
    """The answer of a worker."""
    return {
        "slots": {"used": used, "free": free},
        "step_seconds": {"counts": list(counts), "sum": seconds},
    }


class FakeClient:
    """A client of the workers that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def statistics(self) -> Any:
        self.asked += 1
        return [[worker()]]


def test_the_metrics_are_in_the_registry_that_vllm_exposes() -> None:
    text = generate_latest(REGISTRY).decode()
    for name in ("requests_total", "active_requests", "tokens_total", "refused_total"):
        assert f"# TYPE headway_{name} " in text
    for name in ("failures_total", "unsteered_total", "slots"):
        assert f"# TYPE headway_{name} " in text
    assert "# TYPE headway_step_seconds histogram" in text
    assert "headway_unsteered_total 0.0" in text


def test_series_are_there_before_their_first_event() -> None:
    text = generate_latest(REGISTRY).decode()
    for series in (
        'requests_total{method="sgrs",outcome="failed"}',
        'tokens_total{method="vhr",phase="output"}',
        'refused_total{reason="E_CAPACITY"}',
        'failures_total{stage="coverage"}',
    ):
        assert f"headway_{series} " in text
    assert 'headway_refused_total{reason="E_STEERING_FAILED"}' not in text


def step_seconds() -> dict[str, float]:
    """The samples of the histogram, by their name and bound."""
    (family,) = metrics.STEP_SECONDS.collect()
    return {
        sample.name.removeprefix("headway_step_seconds_")
        + sample.labels.get("le", ""): sample.value
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def counted(statistics: WorkerStatistics, engines: Any) -> dict[str, float]:
    """What taking over statistics adds to the histogram."""
    before = step_seconds()
    statistics.update(engines)
    return {name: value - before[name] for name, value in step_seconds().items()}


def test_the_buckets_are_those_that_the_workers_count_in() -> None:
    seconds = StepSeconds()
    for value in (BUCKETS[0], BUCKETS[3] * 1.01, 5.0):
        seconds.observe(value)
    told = seconds.as_dict()
    assert len(told["counts"]) == len(BUCKETS) + 1
    ours = counted(WorkerStatistics(), [[worker() | {"step_seconds": told}]])
    histogram = Histogram("observed", "One by one.", buckets=BUCKETS, registry=None)
    for value in (BUCKETS[0], BUCKETS[3] * 1.01, 5.0):
        histogram.observe(value)
    (family,) = histogram.collect()
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            name = sample.name.removeprefix("observed_") + sample.labels.get("le", "")
            assert ours[name] == pytest.approx(sample.value), name


def test_steps_are_added_up_over_workers_and_counted_once() -> None:
    statistics = WorkerStatistics()
    added = counted(statistics, [[worker(), worker()], [worker()]])
    assert (added["bucket1e-05"], added["count"], added["sum"]) == (6, 18, pytest.approx(2.25))
    assert set(counted(statistics, [[worker(), worker()], [worker()]]).values()) == {0}
    more = [5, *COUNTS[1:]]
    added = counted(statistics, [[worker(), worker(counts=more, seconds=1.0)], [worker()]])
    assert (added["count"], added["sum"]) == (3, pytest.approx(0.25))


def test_a_worker_that_began_anew_is_counted_from_zero() -> None:
    statistics = WorkerStatistics()
    statistics.update([[worker(counts=[50] * 12, seconds=9.0)]])
    added = counted(statistics, [[worker()]])
    assert (added["count"], added["sum"]) == (6, pytest.approx(0.75))


def test_engines_have_slots_of_their_own_and_ranks_share_them() -> None:
    WorkerStatistics().update([[worker(3, 29), worker(4, 28)], [worker(1, 31)]])
    assert metrics.SLOTS.labels(state="used")._value.get() == 4 + 1
    assert metrics.SLOTS.labels(state="free")._value.get() == 28 + 31


async def test_workers_are_asked_only_after_steered_requests() -> None:
    statistics, client = WorkerStatistics(), FakeClient()
    poll = asyncio.create_task(statistics.poll_forever(client, seconds=0.001))  # type: ignore[arg-type]
    await asyncio.sleep(0.02)
    assert client.asked == 1, "once at the start, then never while nobody steers"
    statistics.note_steered()
    await asyncio.sleep(0.02)
    assert client.asked == 2
    poll.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await poll


async def test_workers_that_others_use_too_are_asked_every_time() -> None:
    statistics, client = WorkerStatistics(), FakeClient()
    poll = asyncio.create_task(statistics.poll_forever(client, seconds=0.001, shared=True))
    await asyncio.sleep(0.05)
    assert client.asked > 2
    poll.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await poll


async def test_the_first_of_the_api_servers_asks_the_workers() -> None:
    def parallel(rank: int, count: int) -> Any:
        return SimpleNamespace(_api_process_rank=rank, _api_process_count=count)

    client = FakeClient()
    assert poll_statistics(client, parallel(1, 2)) is None
    for count in (1, 2):
        poll = poll_statistics(client, parallel(0, count))
        assert poll is not None
        poll.cancel()
    fields = {field.name for field in dataclasses.fields(ParallelConfig)}
    assert {"_api_process_rank", "_api_process_count"} <= fields


SEVERAL_SERVERS = """
import sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from headway.server.http import metrics

metrics.REQUESTS.labels(method="vhr", outcome="ok").inc()
metrics.ACTIVE.inc()
if sys.argv[1] == "0":
    worker = {
        "slots": {"used": 3, "free": 29},
        "step_seconds": {"counts": [2, 3, *[0] * 9, 1], "sum": 0.75},
    }
    metrics.STATISTICS.update([[worker, worker], [worker]])
print("counted", flush=True)
sys.stdin.readline()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_api_servers_tell_the_same(tmp_path: Path) -> None:
    """Each scrape may reach any of them; of two that live, one has asked the workers."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SEVERAL_SERVERS]
    servers = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for server in servers:  # both have counted before the first is scraped
        assert server.stdout is not None and server.stdout.readline() == "counted\n"
    for server in servers:
        text, _ = server.communicate("\n", timeout=60)
        assert server.returncode == 0
        for line in (
            'requests_total{method="vhr",outcome="ok"} 2.0',
            "active_requests 2.0",
            'slots{state="used"} 6.0',
            'slots{state="free"} 58.0',
            "unsteered_total 0.0",
            'failures_total{stage="edit"} 0.0',
            'step_seconds_bucket{le="1e-05"} 6.0',
            'step_seconds_bucket{le="1.0"} 15.0',
            'step_seconds_bucket{le="+Inf"} 18.0',
            "step_seconds_count 18.0",
            "step_seconds_sum 2.25",
        ):
            assert f"headway_{line}" in text, line
