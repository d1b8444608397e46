"""Prometheus metrics of steering; they appear on vLLM's own `/metrics`.

Labels are bounded: methods come from the registry, reasons, stages and outcomes from this code;
of versions of profiles only the last ones are shown. Series with known labels are there from the
start, at 0: Prometheus sees no increase in a series that begins with its first event.
The metrics of the default registry are what vLLM exposes, and with several API servers, where
PROMETHEUS_MULTIPROC_DIR is set, the sum over the servers. What the workers count is asked for, and
added to the metrics, by one of the servers.

prometheus_client symbols relied on: `Histogram._buckets` and `_sum`, because what the workers
observed comes here already counted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from headway.server.engine.statistics import BUCKETS
from headway.steering import Reason
from headway.steering.registry import METHODS

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
STEP_SECONDS = Histogram(
    "headway_step_seconds",
    "Time spent in steering per engine step of a worker, over all workers.",
    buckets=BUCKETS,
)
PROFILE_INFO = Gauge(
    "headway_profile_info",
    "1 for a version of a profile of the registry that was found for a request.",
    ["name", "version"],
    multiprocess_mode="livemostrecent",
)

OUTCOMES = ("ok", "failed", "error", "cancelled")
"""How a steered request ends: answered, steering failed, vLLM's own error, client gone."""

FAILURE_STAGES = (
    *("compile", "load", "registry"),
    *("arrival", "decode", "plan", "slot", "edit", "nonfinite", "sampling"),
    *("report", "coverage"),
)
"""Where steering can fail: in the front end, in a worker, when a worker's account is checked."""


def declare_series() -> None:
    """Make the series whose labels are known."""
    for method in METHODS:
        ATTENTION_ROWS.labels(method=method)
        for outcome in OUTCOMES:
            REQUESTS.labels(method=method, outcome=outcome)
        for phase in ("prompt", "output"):
            TOKENS.labels(method=method, phase=phase)
    for reason in Reason:
        if reason is not Reason.STEERING_FAILED:  # which is a failure, not a refusal
            REFUSED.labels(reason=str(reason))
    for stage in FAILURE_STAGES:
        FAILURES.labels(stage=stage)


declare_series()

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


class WorkerStatistics:
    """The workers' statistics, polled in the background while steered requests run."""

    def __init__(self) -> None:
        self._counted: list[dict[str, Any]] = []  # of each worker, what was asked for last
        self._stale = True

    def note_steered(self) -> None:
        """A steered request started or ended: the next poll has something to ask for."""
        self._stale = True

    async def poll_forever(
        self, client: Any, seconds: float = POLL_SECONDS, shared: bool = False
    ) -> None:
        """Ask the workers every `seconds`, if steered requests ran since the last time.

        client: a `SteeringClient`. shared: other API servers use the workers too, of whose requests
        this one does not know, so it asks every time. Only one of them may poll.
        """
        while True:
            if self._stale or shared:
                self._stale = False
                try:
                    self.update(await client.statistics())
                except Exception:
                    self._stale = True
                    logger.warning("the workers' steering statistics failed", exc_info=True)
            await asyncio.sleep(seconds)

    def update(self, engines: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Take over the answers of the statistics RPC, one per worker of each engine."""
        # The ranks of an engine hold the same slots, so its fullest worker stands for all; engines
        # that work in parallel have slots of their own.
        slots = [[worker["slots"] for worker in workers] for workers in engines]
        SLOTS.labels(state="used").set(sum(max(each["used"] for each in one) for one in slots))
        SLOTS.labels(state="free").set(sum(min(each["free"] for each in one) for one in slots))
        steps = [worker["step_seconds"] for workers in engines for worker in workers]
        for index, step in enumerate(steps):
            before = self._counted[index] if index < len(self._counted) else None
            add_steps(step, before)
        self._counted = steps


def add_steps(step: dict[str, Any], before: dict[str, Any] | None = None) -> None:
    """Add to the histogram what a worker has counted since `before` (see `StepSeconds.as_dict`)."""
    counts, seconds = step["counts"], step["sum"]
    # A worker that has counted fewer began anew.
    if before and all(a <= b for a, b in zip(before["counts"], counts, strict=True)):
        counts = [b - a for a, b in zip(before["counts"], counts, strict=True)]
        seconds -= before["sum"]
    for bucket, count in zip(STEP_SECONDS._buckets, counts, strict=True):
        bucket.inc(count)
    STEP_SECONDS._sum.inc(seconds)


STATISTICS = WorkerStatistics()
