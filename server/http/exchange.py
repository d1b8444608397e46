"""One steered request and its answer: what was asked, what the workers did, what may be said."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import Request

from headway.server.engine.report import EngineReport
from headway.server.engine.request import SteeringRequest
from headway.server.http import metrics
from headway.server.http.requests import Steerable
from headway.server.http.state import ResolvedSteering, SteeringState
from headway.server.registry.readings import ProfileReading, profile_readings
from headway.steering import Reason, SteeringError
from headway.steering.program import AppliedMethod, Readout

logger = logging.getLogger(__name__)

FINGERPRINT_HEADER = "x-headway-fingerprint"

OUTCOMES = ("ok", "failed", "error", "cancelled")
"""How a steered request ends: answered, steering failed, vLLM's own error, client gone."""

SALIENCY_COUNTS = {
    "draws": metrics.SGRS_DRAWS,
    "refusals": metrics.SGRS_REFUSALS,
    "fallbacks": metrics.SGRS_FALLBACKS,
}
"""What is counted of the tokens of a sequence that a gate judges."""

DISCARD_SECONDS = 1.0
_discards: set[asyncio.Task[Any]] = set()


class Exchange:
    """Follows one steered request: `open` and `load` it, ask for `complete` before answering, and
    `close` it.

    body: the request, already validated; its steering is attached here unless it changes nothing.
    messages: the text of each chat message, None where the prompt is no chat.
    """

    def __init__(
        self,
        state: SteeringState,
        steering: ResolvedSteering,
        body: Steerable,
        raw_request: Request,
        messages: tuple[str, ...] | None = None,
    ) -> None:
        self.state = state
        self.steering = steering
        self.body = body
        self.raw_request = raw_request
        self.request = SteeringRequest(steering.program, messages)
        self.usage: Any = None  # vLLM's, where the answer has it
        self._asked_workers = False
        self._report: EngineReport | None = None
        self._outcome: str | None = None
        self._held: list[str] = []
        self._readings: dict[int, ProfileReading] = {}  # of the methods, by index
        self._profiles = [
            applied.profile for applied in steering.program.applied if applied.profile is not None
        ]
        if not steering.program.is_identity:
            body.carry(self.request)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every steered answer."""
        return {FINGERPRINT_HEADER: self.steering.program.fingerprint}

    @property
    def request_id(self) -> str:
        """The id of the response, as soon as vLLM has given it one."""
        metadata = getattr(self.raw_request.state, "request_metadata", None)
        return metadata.request_id if metadata else f"report {self.request.report_id}"

    def open(self) -> None:
        """Count the request as active, and as a user of its vector profiles."""
        metrics.ACTIVE.inc()
        metrics.STATISTICS.note_steered()
        self.state.users.update(self._profiles)

    async def load(self) -> None:
        """Have the workers load the vectors that the request adds, until it is closed.

        Raises SteeringError(E_CAPACITY) where there is no memory for them.
        """
        self._held = await self.state.held.acquire(self.steering.program.artifacts)

    async def complete(self) -> dict[str, Any] | None:
        """The `steering` object of a finished answer; None if the client wants none.

        Raises SteeringError(E_STEERING_FAILED) unless the workers report that every position they
        computed was edited as asked.
        """
        report = None
        if not self.steering.program.is_identity:
            report = await self._pop_report()
            if report is None or not report.is_complete:
                await forget_response(self.raw_request, self.request_id)
                raise self._failure(report)
            self._note_readings(report)
        echo = self._echo(report)
        self.state.reports.put(self.request_id, echo)
        return None if self.steering.spec.report.level == "none" else echo

    async def recorded_failure(self) -> SteeringError | None:
        """Why steering ended the request, if that is what ended it."""
        if self.steering.program.is_identity or not self.body.reached_engine:
            return None
        report = await self._pop_report()
        return self._failure(report) if report and report.failed_stage else None

    def close(self, outcome: str) -> None:
        """Count how the request ended; only the first call counts."""
        if self._outcome is not None:
            return
        self._outcome = outcome
        metrics.ACTIVE.dec()
        metrics.STATISTICS.note_steered()
        self.state.held.release(self._held)
        self.state.users.subtract(self._profiles)
        self.state.users = +self.state.users  # without those that nobody uses any more
        prompt, output = self._tokens()
        for method in {applied.method for applied in self.steering.program.applied}:
            metrics.REQUESTS.labels(method=method, outcome=outcome).inc()
            metrics.TOKENS.labels(method=method, phase="prompt").inc(prompt)
            metrics.TOKENS.labels(method=method, phase="output").inc(output)
        for applied in self.steering.program.applied:
            rows = self._positions(applied) * applied.attention_layers
            if rows:
                metrics.ATTENTION_ROWS.labels(method=applied.method).inc(rows)
        if self.body.reached_engine and not self._asked_workers:
            # The client is gone and with it this task, but the workers still hold its report.
            task = asyncio.ensure_future(self._discard_report())
            _discards.add(task)
            task.add_done_callback(_discards.discard)

    async def _discard_report(self) -> None:
        # vLLM's abort must reach the workers first, or their last step would begin a new report.
        await asyncio.sleep(DISCARD_SECONDS)
        await self._pop_report()

    def _tokens(self) -> tuple[int, int]:
        """Prompt and output tokens, 0 where vLLM did not get as far as counting them."""
        metadata = getattr(self.raw_request.state, "request_metadata", None)
        usage = self.usage or getattr(metadata, "final_usage_info", None)
        if usage is None:
            return 0, 0
        if hasattr(usage, "input_tokens"):
            return usage.input_tokens, usage.output_tokens
        return usage.prompt_tokens, usage.completion_tokens or 0

    async def _pop_report(self) -> EngineReport | None:
        self._asked_workers = True
        try:
            self._report = await self.state.client.pop_report(self.request.report_id)
        except Exception:
            logger.exception("no steering report for request %s", self.request_id)
        # Here because the workers give a report once, also that of a request whose client left.
        for sequence in self._report.saliency if self._report else ():
            for name, counter in SALIENCY_COUNTS.items():
                counter.inc(sequence[name])
        return self._report

    def _failure(self, report: EngineReport | None) -> SteeringError:
        if report is not None and report.failed_stage:
            stage, why = report.failed_stage, report.failure or "no details"
        else:
            metrics.UNSTEERED.inc()
            if report is None:
                stage, why = "report", "the workers have no report of the request"
            else:
                stage, why = "coverage", report.coverage
        metrics.FAILURES.labels(stage=stage).inc()
        message = f"steering failed at stage {stage}: {why} (request {self.request_id})"
        logger.error("%s", message)
        return SteeringError(Reason.STEERING_FAILED, message)

    def _note_readings(self, report: EngineReport) -> None:
        """Keep what the probes read at the last token of the prompt, unless there are several."""
        if report.sequences > (getattr(self.body, "n", None) or 1):
            return
        self._readings = profile_readings(self.steering.program, report.probes)
        self.state.readings.put(self.request_id, self._readings.values())

    def _echo(self, report: EngineReport | None) -> dict[str, Any]:
        program, spec = self.steering.program, self.steering.spec
        echo: dict[str, Any] = {
            "fingerprint": program.fingerprint,
            "identity": program.is_identity,
            "methods": [
                self._applied(applied, report, self._readings.get(index))
                for index, applied in enumerate(program.applied)
            ],
            "report": spec.report.level,
            "positions_edited": report.positions_edited if report else 0,
            "warnings": list(program.warnings),
        }
        if spec.preset is not None:
            echo["preset"] = spec.preset
        if report is not None:
            echo["positions_computed"] = report.positions_computed
            echo["sequences"] = report.sequences
            echo |= attention_echo(report.readings)
            if Readout.SALIENCY in program.readouts:
                gated = program.sampling_gate is not None
                echo["saliency"] = saliency_echo(report.saliency, gated)
        return echo

    def _applied(
        self, applied: AppliedMethod, report: EngineReport | None, read: ProfileReading | None
    ) -> dict[str, Any]:
        """One method as it was carried out; heads that were chosen in place of how to choose."""
        echo = applied.as_dict()
        if applied.scope is not None:
            echo["positions_edited"] = self._positions(applied)
        if applied.gates:
            # Of an identity (a gate that refuses nobody) nothing was drawn.
            counts = report.saliency if report else []
            echo |= {name: sum(each[name] for each in counts) for name in SALIENCY_COUNTS}
        if applied.chooses_heads and report is not None:
            echo["heads"] = report.heads
        if read is not None:
            picked = zip(read.reading.layers, read.reading.clusters, strict=True)
            echo["clusters"] = {str(layer): cluster for layer, cluster in picked}
        return echo

    def _positions(self, applied: AppliedMethod) -> int:
        """How many positions a method edited."""
        by_scope = self._report.by_scope if self._report else {}
        return by_scope.get(str(applied.scope), 0) if applied.scope is not None else 0


def saliency_echo(sequences: list[dict[str, Any]], gated: bool) -> list[list[dict[str, Any]]]:
    """What an answer shows of the saliency of its tokens: a list per sequence.

    Where a gate judged them also the threshold and how many candidates were drawn and refused.
    """
    names = ("position", "token_id", "saliency", "threshold", "draws", "refusals", "fallback")
    shown = names if gated else names[:3]
    echo = []
    for sequence in sequences:
        tokens = [dict(zip(names, token, strict=True)) for token in sequence["tokens"]]
        for token in tokens:
            token["fallback"] = bool(token["fallback"])
        echo.append([{name: token[name] for name in shown} for token in tokens])
    return echo


def attention_echo(readings: dict[str, Any] | None) -> dict[str, Any]:
    """What an answer shows of the masses that were read in the workers.

    image_centric_share: of the (query, head, layer) triples whose edit has a condition, the share
    where it held. class_masses: per (layer, head), the masses of the edit's class A, class B and
    of the image, at the last position and as the mean over the output positions.
    """
    echo: dict[str, Any] = {}
    if readings and readings["considered"]:
        echo["image_centric_share"] = readings["met"] / readings["considered"]
    if readings and readings["masses"]:
        names = ("class_a", "class_b", "image")
        echo["class_masses"] = [
            {
                "layer": layer,
                "head": head,
                "last": dict(zip(names, last, strict=True)),
                "output_mean": dict(zip(names, mean, strict=True)),
            }
            for layer, head, last, mean in sorted(readings["masses"])
        ]
    return echo


async def forget_response(raw_request: Request, response_id: str) -> None:
    """Drop a response that must not be served from vLLM's store of responses either."""
    handler = getattr(raw_request.app.state, "openai_serving_responses", None)
    if handler is not None:
        async with handler.response_store_lock:
            handler.response_store.pop(response_id, None)
