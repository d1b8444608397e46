"""What the requests of a step add to its plan: the slots they hold, and what is done to which rows.

Independent of vLLM's runners, as `steering_state.py` is, which says what runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headway.server.engine.kept_reports import KeptReports
from headway.server.engine.probe_readings import ProbeReadings, ProbeRow
from headway.server.engine.readings import RequestReadings
from headway.server.engine.saliency_tape import SaliencyRow
from headway.server.engine.sinks import SinkRows
from headway.server.engine.steered_request import SteeredRequest
from headway.server.engine.step_plan import Planner, Scheduled, Span
from headway.steering import ModelGeometry
from headway.steering.positions import Run, scope_ranges
from headway.steering.program import Readout


@dataclass(frozen=True)
class Rows:
    """The rows of one steered request in a step, and the position of the first of them."""

    request_id: str
    index: int
    start: int
    count: int
    position: int


class RequestRows:
    """Puts steered requests into steps, and into the tables while they are in the batch."""

    def __init__(self, geometry: ModelGeometry, planner: Planner, reports: KeptReports) -> None:
        self.geometry = geometry
        self.planner = planner
        self.tables = planner.tables
        self.reports = reports

    def plan(self, request: SteeredRequest, each: Rows, step: Scheduled) -> None:
        """Add the spans and sink rows of one request to a step; all of them or, raising, none."""
        facts, stop = request.facts, each.position + each.count
        own = each.request_id, each.start, each.position, each.count
        capture, choice = request.capture(*own), request.choice(*own, self.tables.layers)
        pieces = [run for run in request.runs(each.position, stop) if run.active]
        spans, readings, mass_rows = [], [], step.mass_rows
        for run in pieces:
            slot = self._slot(request, run)
            reads = request.reads and bool(self.tables.attends[slot].any())
            span = Span(
                each.request_id,
                slot,
                each.start + run.start - each.position,
                each.start + run.stop - each.position,
                each.index,
                each.count,
                facts.prompt_len,
                self._tag_row(request),
                mass_rows if reads else -1,
            )
            spans.append(span)
            if reads:
                mass_rows += run.stop - run.start
                outputs_from = max(facts.prompt_len - run.start, 0)
                kept = self._readings(request)
                self.planner.reserve(kept)
                kept.outputs += max(run.stop - run.start - outputs_from, 0)
                readings.append((span, kept, outputs_from))
        if request.sink_layers is not None and each.position < facts.prompt_len:
            rows = min(stop, facts.prompt_len) - each.position
            rule = request.program.sink_rule
            assert rule is not None
            step.sink_rows.append(
                SinkRows(each.request_id, rule, each.start, each.start + rows, request.sink_layers)
            )
        if choice is not None:
            choice.slots += sorted({span.slot for span in spans})
            step.choices.append(choice)
        if capture is not None:
            step.captures.append(capture)
        if request.reads_probes:
            step.probe_rows += self._probe_rows(request, each, spans)
        step.spans += spans
        step.positions += [run.start for run in pieces]
        step.readings += readings
        step.mass_rows = mass_rows

    def plan_saliency(self, request: SteeredRequest, each: Rows, step: Scheduled) -> None:
        """Ask for the saliencies of the candidates for a request's next token, if it needs them."""
        rule, facts = request.program.saliency, request.facts
        if rule is None:
            return
        row, position = each.start + each.count - 1, each.position + each.count - 1
        spans = [span for span in step.spans if span.request_id == each.request_id]
        slot = next((span.slot for span in spans if span.start <= row < span.stop), -1)
        step.saliency_rows.append(
            SaliencyRow(
                each.request_id,
                row,
                each.index,
                position,
                facts.prompt_len,
                slot,
                -1 if request.tag_row is None else request.tag_row,
                rule.layers,
                scope_ranges(rule.history, facts),
            )
        )

    def release(self, request: SteeredRequest) -> None:
        """Give back what a request holds in the tables."""
        if not request.slots and request.tag_row is None:
            return
        for slot in request.slots.values():
            self.tables.release(slot)
        request.slots.clear()
        request.scopes_of.clear()
        if request.tag_row is not None:
            self.tables.release_tags(request.tag_row)
            request.tag_row = None
        if request.reads and request.report_id in self.reports.readings:
            self.planner.release(self.reports.readings[request.report_id])
        self.planner.changed()

    def _probe_rows(
        self, request: SteeredRequest, each: Rows, spans: Sequence[Span]
    ) -> Iterator[ProbeRow]:
        """The row of the last prompt position, if it is one of these; of the first sequence."""
        row = each.start + request.facts.prompt_len - 1 - each.position
        for span in spans:
            if span.start <= row < span.stop:
                made = ProbeReadings(each.request_id)
                kept = self.reports.probes.setdefault(request.report_id, made)
                if kept.request_id == each.request_id:
                    yield ProbeRow(each.request_id, row, span.slot, kept)

    def _slot(self, request: SteeredRequest, run: Run) -> int:
        if run.active not in request.slots:
            words, parts = request.edits(run.active, self.geometry, self.tables.heads)
            slot = self.tables.acquire(words, parts, request.unchosen_layers)
            request.take_slot(run.active, slot)
            self.planner.changed()
        return request.slots[run.active]

    def _tag_row(self, request: SteeredRequest) -> int:
        if not request.has_tags:
            return -1
        if request.tag_row is None:
            request.tag_row = self.tables.acquire_tags(request.facts)
            self.planner.changed()
        return request.tag_row

    def _readings(self, request: SteeredRequest) -> RequestReadings:
        wants = Readout.CLASS_MASSES in request.program.readouts
        return self.reports.readings.setdefault(request.report_id, RequestReadings(wants))
