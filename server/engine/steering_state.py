"""The steered requests of one worker: their programs, slots and reports.

Independent of vLLM's runners: an adapter tells it which requests come, go and run, and asks for
the plan of each step. No method raises for something a single request did; it fails that request.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from headway.server.engine.report import EngineReport
from headway.server.engine.slots import SlotTables
from headway.server.engine.statistics import StepSeconds
from headway.server.engine.step_plan import RowLayout, Span, StepPlan
from headway.steering import ModelGeometry
from headway.steering.program import HeadEdit
from headway.steering.wire import decode_head_edits

logger = logging.getLogger(__name__)

MAX_REPORTS = 4096
"""Reports kept for requests whose front end never asked for them (a client that went away)."""


@dataclass
class SteeredRequest:
    """One sequence being steered. `slot` is None while it is not in the batch."""

    report_id: str
    edits: tuple[HeadEdit, ...] = ()
    slot: int | None = None


class SteeringState:
    """Steered requests of a worker, from arrival to end, across preemption."""

    def __init__(self, geometry: ModelGeometry, tables: SlotTables) -> None:
        self.geometry = geometry
        self.tables = tables
        self.requests: dict[str, SteeredRequest] = {}
        self.reports: OrderedDict[str, EngineReport] = OrderedDict()
        self.step_seconds = StepSeconds()
        self._failed: set[str] = set()
        self._layout: RowLayout | None = None

    def add(self, request_id: str, payload: dict[str, Any]) -> None:
        """A new request (or a new turn of a resumable one) with an encoded program."""
        self.remove([request_id])
        request = SteeredRequest(str(payload.get("report_id") or request_id))
        self._report(request).sequences += 1
        self.requests[request_id] = request
        with self.guard("decode", [request_id]):
            request.edits = decode_head_edits(payload, self.geometry)

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended; their reports stay until asked for."""
        if not self.requests:
            return
        for request_id in request_ids:
            request = self.requests.pop(request_id, None)
            if request is not None:
                self._release(request)
            self._failed.discard(request_id)

    def plan_step(
        self, request_ids: Sequence[str], num_scheduled_tokens: Sequence[int]
    ) -> StepPlan | None:
        """The plan of a step over these requests, in batch order; None if none is steered."""
        if not self.requests:
            return None
        started = time.perf_counter()
        rows: dict[str, tuple[int, int]] = {}
        start = 0
        for request_id, count in zip(request_ids, num_scheduled_tokens, strict=True):
            if request_id in self.requests:
                rows[request_id] = start, start + int(count)
            start += int(count)
        for request_id in self.requests.keys() - rows.keys():
            self._release(self.requests[request_id])
        spans = []
        for request_id, (start, stop) in rows.items():
            request = self.requests[request_id]
            self._report(request).positions_computed += stop - start
            with self.guard("slot", [request_id]):
                if request_id not in self._failed:
                    spans.append(Span(request_id, self._slot(request), start, stop))
        if not spans:
            return None
        plan = StepPlan(self.tables, self._lay_out(tuple(spans)))
        plan.seconds = time.perf_counter() - started
        return plan

    def close_step(self, plan: StepPlan) -> None:
        """Count what a step did, after its forward pass."""
        missed = plan.layout.layers - plan.layers_done
        for span in plan.layout.spans:
            error = plan.failures.get(span.request_id)
            if missed and error is None and self.tables.edited[span.slot, list(missed)].any():
                error = RuntimeError(f"no attention edit ran on layers {sorted(missed)}")
            if error is None:
                request = self.requests[span.request_id]
                self._report(request).positions_edited += span.stop - span.start
            else:
                self._fail(span.request_id, "edit", error)
        self.step_seconds.observe(plan.seconds)

    def take_failed(self) -> tuple[str, ...]:
        """Ids of the requests that failed since this was last asked, for the scheduler to end."""
        if not self._failed:
            return ()
        failed = tuple(self._failed)
        self._failed.clear()
        return failed

    def pop_report(self, report_id: str) -> EngineReport | None:
        """The report of a request, forgotten by asking for it."""
        return self.reports.pop(report_id, None)

    @contextmanager
    def guard(self, stage: str, request_ids: Iterable[str] | None = None) -> Iterator[None]:
        """Turn an exception into the failure of the given requests (None: of all steered ones).

        An exception that left a hook would take the whole engine down.
        """
        try:
            yield
        except Exception as error:
            for request_id in list(self.requests if request_ids is None else request_ids):
                self._fail(request_id, stage, error)

    def _slot(self, request: SteeredRequest) -> int:
        if request.slot is None:
            request.slot = self.tables.acquire(request.edits)
            self._layout = None
        return request.slot

    def _lay_out(self, spans: tuple[Span, ...]) -> RowLayout:
        # In steady decode the batch does not change, and neither does its layout.
        if self._layout is None or self._layout.spans != spans:
            self._layout = RowLayout.of(spans, self.tables)
        return self._layout

    def _release(self, request: SteeredRequest) -> None:
        if request.slot is not None:
            self.tables.release(request.slot)
            request.slot = None
            self._layout = None

    def _report(self, request: SteeredRequest) -> EngineReport:
        report = self.reports.setdefault(request.report_id, EngineReport())
        while len(self.reports) > MAX_REPORTS:
            self.reports.popitem(last=False)
        return report

    def _fail(self, request_id: str, stage: str, error: Exception) -> None:
        report = self._report(self.requests[request_id])
        if report.failed_stage is None:
            report.failed_stage = stage
            report.failure = f"{type(error).__name__}: {error}"
            logger.error("steering failed for request %s at %s: %r", request_id, stage, error)
        self._failed.add(request_id)
