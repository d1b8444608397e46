"""Prometheus metrics of steering; they appear on vLLM's own `/metrics`.

Labels are bounded: methods come from the registry, reasons, stages and outcomes from this code;
of versions of profiles only the last ones are shown.
The metrics of the default registry are what vLLM exposes, and with several API servers, where
PROMETHEUS_MULTIPROC_DIR is set, the sum over the servers; only the step histogram, which the
workers count, needs a single API server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0

REQUESTS = Counter(
    "headway_requests", "Steered requests by method and outcome.", ["method", "outcome"]
)
ACTIVE = Gauge(
    "headway_active_requests", "Steered requests being served.", multiprocess_mode="livesum"
)
TOKENS = Counter(
    "headway_tokens", "Tokens of steered requests by method and phase.", ["method", "phase"]
)
ATTENTION_ROWS = Counter(
    "headway_attention_rows",
    "Attention rows edited: positions times layers at which a method edits attention weights.",
    ["method"],
)
REFUSED = Counter("headway_refused", "Steering requests refused, by reason.", ["reason"])
FAILURES = Counter("headway_failures", "Steered requests that failed, by stage.", ["stage"])
UNSTEERED = Counter(
    "headway_unsteered",
    "Steered requests that were found not to be steered as asked; withheld. Must stay 0.",
)
SGRS_DRAWS = Counter("headway_sgrs_draws", "Candidates drawn for the next token by SGRS.")
SGRS_REFUSALS = Counter("headway_sgrs_refusals", "Candidates that SGRS refused.")
SGRS_FALLBACKS = Counter(
    "headway_sgrs_fallbacks",
    "Tokens for which SGRS refused all draws and took the most salient candidate.",
)
SLOTS = Gauge(
    "headway_slots",
    "Steering slots of the workers by state.",
    ["state"],
    multiprocess_mode="livemostrecent",
)
PROFILE_INFO = Gauge(
    "headway_profile_info",
    "1 for a version of a profile of the registry that was found for a request.",
    ["name", "version"],
    multiprocess_mode="livemostrecent",
)

MAX_PROFILE_LABELS = 256
"""Versions shown at most; those that were found least recently go first."""


class FoundVersions:
    """The versions that `PROFILE_INFO` shows."""

    def __init__(self, capacity: int = MAX_PROFILE_LABELS) -> None:
        self._capacity = capacity
        self._shown: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, name: str, version: int) -> None:
        """A version was found."""
        labels = name, str(version)
        with self._lock:
            if labels in self._shown:
                self._shown.move_to_end(labels)
                return
            self._shown[labels] = None
            PROFILE_INFO.labels(*labels).set(1)
            while len(self._shown) > self._capacity:
                self._remove(next(iter(self._shown)))

    def forget(self, name: str, version: int) -> None:
        """A version was deleted."""
        with self._lock:
            self._remove((name, str(version)))

    def _remove(self, labels: tuple[str, str]) -> None:
        self._shown.pop(labels, None)
        # With several API servers a series stays in the files; the latest value counts there.
        PROFILE_INFO.labels(*labels).set(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # which says just that
            PROFILE_INFO.remove(*labels)


FOUND_VERSIONS = FoundVersions()


class WorkerStatistics(Collector):
    """The workers' statistics, polled in the background while steered requests run."""

    def __init__(self) -> None:
        self.workers: list[dict[str, Any]] = []
        self._stale = True

    def note_steered(self) -> None:
        """A steered request started or ended: the next poll has something to ask for."""
        self._stale = True

    async def poll_forever(self, client: Any, seconds: float = POLL_SECONDS) -> None:
        """Ask the workers every `seconds`, if steered requests ran since the last time.

        client: a `SteeringClient`.
        """
        while True:
            if self._stale:
                self._stale = False
                try:
                    self.update(await client.statistics())
                except Exception:
                    self._stale = True
                    logger.warning("the workers' steering statistics failed", exc_info=True)
            await asyncio.sleep(seconds)

    def update(self, workers: list[dict[str, Any]]) -> None:
        """Take over the answers of the statistics RPC, one per worker."""
        self.workers = workers
        for state in ("used", "free"):
            # Tensor-parallel ranks hold the same slots, so the fullest worker stands for all.
            values = [worker["slots"][state] for worker in workers]
            if values:
                SLOTS.labels(state=state).set(max(values) if state == "used" else min(values))

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """`headway_step_seconds`, the sum over the workers."""
        family = HistogramMetricFamily(
            "headway_step_seconds", "Time spent in steering per engine step of a worker."
        )
        steps = [worker["step_seconds"] for worker in self.workers]
        if steps:
            bounds = [*(str(float(bound)) for bound in steps[0]["buckets"]), "+Inf"]
            counts = [
                sum(column) for column in zip(*(step["counts"] for step in steps), strict=True)
            ]
            family.add_metric(
                [],
                list(zip(bounds, counts, strict=True)),
                sum_value=sum(step["sum"] for step in steps),
            )
        return [family]


STATISTICS = WorkerStatistics()
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    REGISTRY.register(STATISTICS)
