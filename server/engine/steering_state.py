"""The steered requests of one worker: their programs, slots and reports.

Independent of vLLM's runners: an adapter tells it which requests come, go and run, and asks for
the plan of each step. No method raises for something a single request did; it fails that request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from headway.server.engine.artifact_shelf import RESIDENT, ArtifactShelf
from headway.server.engine.head_choice import Choice, TextRows
from headway.server.engine.kept_reports import KeptReports
from headway.server.engine.report import EngineReport
from headway.server.engine.request_rows import RequestRows, Rows
from headway.server.engine.saliency_tape import SaliencyTape
from headway.server.engine.sampling_gate import Gates
from headway.server.engine.sinks import SinkRows
from headway.server.engine.statistics import StepSeconds
from headway.server.engine.steered_request import SteeredRequest
from headway.server.engine.step_plan import Planner, Scheduled, Span, StepPlan
from headway.steering import ModelGeometry
from headway.steering.vectors import given_artifacts

logger = logging.getLogger(__name__)


class SteeringState:
    """Steered requests of a worker, from arrival to end, across preemption."""

    def __init__(self, geometry: ModelGeometry, planner: Planner) -> None:
        self.geometry = geometry
        self.planner = planner
        self.tables = planner.tables
        self.requests: dict[str, SteeredRequest] = {}
        self.artifacts = ArtifactShelf(self.tables.max_clusters)
        self.artifacts.load(list(given_artifacts(geometry).values()), RESIDENT)
        self.texts: dict[str, TextRows] = {}
        self.gates = Gates()
        self.reports = KeptReports(planner, self.gates)
        self.rows = RequestRows(geometry, planner, self.reports)
        self.tape: SaliencyTape | None = None
        self.no_saliency = ""
        self.step_seconds = StepSeconds()
        self._failed: set[str] = set()
        self._preempted: set[str] = set()

    def add(self, request_id: str, payload: dict[str, Any], sampling: Any = None) -> None:
        """A new request (or a new turn of a resumable one) with an encoded program.

        sampling: its vLLM `SamplingParams`, for the seed and the end tokens of a sampling gate. One
        that was preempted comes back with what was counted and read so far.
        """
        if request_id in self._preempted:
            self._preempted.discard(request_id)
            request = self.requests[request_id]
        else:
            self.remove([request_id])
            request = SteeredRequest(str(payload.get("report_id") or request_id))
            self.reports.of(request.report_id).sequences += 1
            self.requests[request_id] = request
        with self.guard("decode", [request_id]):
            # One that comes back goes on with the artefacts that it had.
            known = {part.artifact.digest: part.artifact for part in request.parts}
            artifacts = {**self.artifacts.artifacts, **known}
            request.prepare(payload, self.geometry, self.tables.layers, artifacts)
            request.take_text(payload, self.texts)
            if request.program.saliency is not None:
                if self.no_saliency:
                    raise RuntimeError(self.no_saliency)
                self.gates.add(request_id, request.report_id, request.program, sampling)

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended; their reports stay until asked for."""
        if not self.requests:
            return
        for request_id in request_ids:
            request = self.requests.pop(request_id, None)
            if request is not None:
                self.rows.release(request)
                self.gates.remove(request_id)
                if request.is_text_pass:
                    self.reports.pop(request.report_id, None)
            self._failed.discard(request_id)
            self._preempted.discard(request_id)

    def preempt(self, request_ids: Iterable[str]) -> None:
        """Requests that leave the batch and will be added again, for runners that do so."""
        for request_id in request_ids:
            if request_id in self.requests:
                self.rows.release(self.requests[request_id])
                self._preempted.add(request_id)

    @property
    def num_placed(self) -> int:
        """Steered requests that are in the batch and hold slots."""
        return sum(bool(request.slots) for request in self.requests.values())

    @property
    def is_choosing(self) -> bool:
        """Whether heads are being chosen, or what they are chosen by is being found out."""
        return any(each.is_text_pass or each.must_choose for each in self.requests.values())

    def plan_step(
        self,
        request_ids: Sequence[str],
        num_scheduled_tokens: Sequence[int],
        num_computed_tokens: Sequence[int],
        samples: Sequence[bool] | None = None,
        rotary_positions: torch.Tensor | None = None,
    ) -> StepPlan | None:
        """The plan of a step over these requests, in batch order; None if none is steered.

        num_computed_tokens: the position of the first row of each request. samples: whether a token
        is drawn from its last one. rotary_positions: int64 [num_tokens] or [3, num_tokens].
        """
        if not self.requests:
            return None
        started = time.perf_counter()
        scheduled = []
        start = 0
        for index, request_id in enumerate(request_ids):
            count = int(num_scheduled_tokens[index])
            if request_id in self.requests:
                position = int(num_computed_tokens[index])
                scheduled.append(Rows(request_id, index, start, count, position))
            start += count
        for request_id in self.requests.keys() - {each.request_id for each in scheduled}:
            self.rows.release(self.requests[request_id])
        step = Scheduled(len(request_ids), start, rotary_positions=rotary_positions)
        for each in scheduled:
            report = self.reports.of(self.requests[each.request_id].report_id)
            report.positions_computed += each.count
            with self.guard("slot", [each.request_id]):
                if each.request_id not in self._failed:
                    request = self.requests[each.request_id]
                    self.rows.plan(request, each, step)
                    if samples is not None and samples[each.index]:
                        self.rows.plan_saliency(request, each, step)
        self._join_text_passes(step)
        if step.is_empty:
            return None
        plan = self.planner.plan(step)
        self.tape = plan.tape
        plan.seconds = time.perf_counter() - started
        return plan

    def close_step(self, plan: StepPlan) -> None:
        """Count what a step did, after its forward pass."""
        items: list[Span | SinkRows] = [*plan.spans, *plan.sink_rows]
        for request_id, error in plan.failures.items():
            self._fail(request_id, "edit", error)
        for item in () if plan.is_complete else items:
            if item.request_id not in plan.failures and (missed := plan.missed(item)):
                message = f"an edit did not run on layers {missed}"
                self._fail(item.request_id, "edit", RuntimeError(message))
        for span in plan.spans:
            request = self.requests[span.request_id]
            report, count = self.reports.of(request.report_id), span.stop - span.start
            if span.request_id in self._failed:
                report.positions_missed += count
                continue
            report.positions_edited += count
            for scope in request.scopes_of[span.slot]:
                report.by_scope[scope] = report.by_scope.get(scope, 0) + count
        for choice in plan.choices:
            if choice.request_id not in self._failed:
                self._keep_choice(choice)
        plan.collect()
        self.count_time((span.request_id for span in plan.spans), plan.seconds)
        if plan.tape is not None:
            plan.tape.seconds = plan.seconds  # the step goes on when it samples
        else:
            self.step_seconds.observe(plan.seconds)

    def count_time(self, request_ids: Iterable[str], seconds: float) -> None:
        """Add what steering took in a step to the reports of the requests that shared it."""
        known = (self.requests.get(request_id) for request_id in request_ids)
        for report_id in {request.report_id for request in known if request is not None}:
            self.reports.of(report_id).seconds += seconds

    def take_failed(self) -> tuple[str, ...]:
        """Ids of the requests that failed since this was last asked, for the scheduler to end."""
        if not self._failed:
            return ()
        failed = tuple(self._failed)
        self._failed.clear()
        return failed

    def pop_report(self, report_id: str) -> EngineReport | None:
        """The report of a request, forgotten by asking for it."""
        return self.reports.take(report_id)

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

    def take_tape(self) -> SaliencyTape | None:
        """What the step left behind for the saliencies of its rows, once."""
        tape, self.tape = self.tape, None
        return tape

    def _join_text_passes(self, step: Scheduled) -> None:
        """Have the heads of a text pass scaled with those of the request that it is for."""
        for capture in list(step.captures):
            request = self.requests[capture.request_id]
            if not request.must_choose:
                continue
            choice = next((each for each in step.choices if each.text is capture.text), None)
            with self.guard("slot", [capture.request_id]):
                if choice is None:
                    step.captures.remove(capture)  # who came later would be compared with it
                    raise RuntimeError("a text pass to be scaled ran without its request")
                choice.slots += sorted(request.slots.values())

    def _keep_choice(self, choice: Choice) -> None:
        """The heads of a request are chosen once."""
        request = self.requests[choice.request_id]
        with self.guard("edit", [choice.request_id]):
            request.chosen = self.reports.chosen[request.report_id] = choice.result()

    def _fail(self, request_id: str, stage: str, error: Exception) -> None:
        report = self.reports.of(self.requests[request_id].report_id)
        if report.fail(stage, error):
            logger.error("steering failed for request %s at %s: %r", request_id, stage, error)
        self._failed.add(request_id)
