"""What the workers' statistics look like on /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from headway.server.http import metrics
from headway.server.http.metrics import WorkerStatistics

pytestmark = pytest.mark.unit

WORKER = {
    "slots": {"used": 3, "free": 29},
    "step_seconds": {"buckets": [0.001, 0.1], "counts": [2, 5, 6], "sum": 0.75},
}


class FakeClient:
    """A client of the workers that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def statistics(self) -> list[dict[str, object]]:
        self.asked += 1
        return [WORKER]


def test_the_metrics_are_in_the_registry_that_vllm_exposes() -> None:
    text = generate_latest(REGISTRY).decode()
    for name in ("requests_total", "active_requests", "tokens_total", "refused_total"):
        assert f"# TYPE headway_{name} " in text
    for name in ("failures_total", "unsteered_total", "slots"):
        assert f"# TYPE headway_{name} " in text
    assert "# TYPE headway_step_seconds histogram" in text
    assert "headway_unsteered_total 0.0" in text


def test_step_seconds_is_the_sum_over_workers() -> None:
    statistics = WorkerStatistics()
    registry = CollectorRegistry()
    registry.register(statistics)
    statistics.update([WORKER, WORKER])
    text = generate_latest(registry).decode()
    assert 'headway_step_seconds_bucket{le="0.001"} 4.0' in text
    assert 'headway_step_seconds_bucket{le="+Inf"} 12.0' in text
    assert "headway_step_seconds_sum 1.5" in text
    assert "headway_step_seconds_count 12.0" in text
    assert metrics.SLOTS.labels(state="used")._value.get() == 3
    assert metrics.SLOTS.labels(state="free")._value.get() == 29


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


SEVERAL_SERVERS = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from headway.server.http import metrics
metrics.REQUESTS.labels(method="vhr", outcome="ok").inc()
metrics.ACTIVE.inc()
metrics.SLOTS.labels(state="used").set(3)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_api_servers_share_their_counts(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SEVERAL_SERVERS]
    for served in (1, 2):
        text = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout
        total = f'headway_requests_total{{method="vhr",outcome="ok"}} {served}.0'
        assert total in text
        assert 'headway_slots{state="used"} 3.0' in text
        assert "headway_unsteered_total 0.0" in text
