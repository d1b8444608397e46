"""One steered request and its answer: what was asked, what the workers did, what may be said."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import Request

from headway.server.engine.report import EngineReport
from headway.server.engine.request import SteeringRequest
from headway.server.http import metrics
from headway.server.http.clients import current_client
from headway.server.http.echo import SALIENCY_COUNTS, echo_of, positions_edited
from headway.server.http.errors import steering_failure
from headway.server.http.limits import Place
from headway.server.http.observation import Observation, facts_of
from headway.server.http.requests import Steerable
from headway.server.http.state import ResolvedSteering, SteeringState
from headway.server.registry.readings import ProfileReading, profile_readings
from headway.steering import SteeringError

logger = logging.getLogger(__name__)

FINGERPRINT_HEADER = "x-headway-fingerprint"

SGRS_COUNTERS = dict(
    zip(
        SALIENCY_COUNTS,
        (metrics.SGRS_DRAWS, metrics.SGRS_REFUSALS, metrics.SGRS_FALLBACKS),
        strict=True,
    )
)

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
        observation: Observation | None = None,
    ) -> None:
        self.state = state
        self.steering = steering
        self.body = body
        self.raw_request = raw_request
        self.request = SteeringRequest(steering.program, messages)
        self.observation = observation or Observation({})
        self.usage: Any = None  # vLLM's, where the answer has it
        self.error: SteeringError | None = None  # what ended it, if that was known
        self.client = current_client()
        self._place: Place | None = None
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
        """Take a place, and count the request as active, and as a user of its vector profiles.

        Raises SteeringError as `Places.take`; there is then nothing to close.
        """
        self._place = self.state.places.take(self.client, self.steering.program, self.body)
        metrics.ACTIVE.inc()
        self.observation.trace(self.raw_request)
        metrics.STATISTICS.note_steered()
        self.state.users.update(self._profiles)

    async def load(self) -> None:
        """Have the workers load the vectors that the request adds, until it is closed.

        Raises SteeringError: E_CAPACITY where there is no memory for them, E_STEERING_FAILED where
        the workers cannot take them.
        """
        artifacts = self.steering.program.artifacts
        if not artifacts:
            return
        try:
            with self.observation.part("load"):
                self._held = await self.state.held.acquire(artifacts)
        except SteeringError:
            raise
        except Exception as error:
            if self.state.lifetime.ending is not None:
                raise self.state.lifetime.refusal() from error
            raise steering_failure("load", error, self.request_id) from error

    async def complete(self) -> dict[str, Any] | None:
        """The `steering` object of a finished answer; None if the client wants none.

        Raises SteeringError(E_STEERING_FAILED) unless the workers report that every position they
        computed was edited as asked; E_UNAVAILABLE where the server ended before they could.
        """
        report = None
        if not self.steering.program.is_identity:
            with self.observation.part("confirm"):
                report = await self._pop_report()
            if report is None or not report.is_complete:
                await forget_response(self.raw_request, self.request_id)
                self.error = self._failure(report)
                raise self.error
            self._note_readings(report)
        echo = echo_of(self.steering, report, self._readings)
        self.state.reports.put(self.request_id, echo, self.client)
        return None if self.steering.spec.report.level == "none" else echo

    async def recorded_failure(self) -> SteeringError | None:
        """Why steering ended the request, if that is what ended it."""
        if self.steering.program.is_identity or not self.body.reached_engine:
            return None
        report = await self._pop_report()
        if report is None or not report.failed_stage:
            return None
        self.error = self._failure(report)
        return self.error

    def close(self, outcome: str) -> None:
        """Count how the request ended; only the first call counts."""
        if self._outcome is not None:
            return
        self._outcome = outcome
        if self._place is not None:
            self.state.places.release(self._place)
        metrics.ACTIVE.dec()
        metrics.STATISTICS.note_steered()
        self.state.held.release(self._held)
        self.state.users.subtract(self._profiles)
        self.state.users = +self.state.users  # without those that nobody uses any more
        prompt, output = tokens = self._tokens()
        for method in {applied.method for applied in self.steering.program.applied}:
            metrics.REQUESTS.labels(method=method, outcome=outcome).inc()
            metrics.TOKENS.labels(method=method, phase="prompt").inc(prompt)
            metrics.TOKENS.labels(method=method, phase="output").inc(output)
        for applied in self.steering.program.applied:
            rows = positions_edited(applied, self._report) * applied.attention_layers
            if rows:
                metrics.ATTENTION_ROWS.labels(method=applied.method).inc(rows)
        if self.body.reached_engine and not self._asked_workers:
            # The client is gone and with it this task, but the workers still hold its report.
            task = asyncio.ensure_future(self._discard_report())
            _discards.add(task)
            task.add_done_callback(_discards.discard)
        metadata = getattr(self.raw_request.state, "request_metadata", None)
        request_id = metadata.request_id if metadata else None
        facts = facts_of(self.steering.program, request_id, tokens, self._report)
        self.observation.end(outcome, facts | {"preset": self.steering.spec.preset}, self.error)

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
            for name, counter in SGRS_COUNTERS.items():
                counter.inc(sequence[name])
        return self._report

    def _failure(self, report: EngineReport | None) -> SteeringError:
        if report is not None and report.failed_stage:
            stage, why = report.failed_stage, report.failure or "no details"
        elif report is None and self.state.lifetime.ending is not None:
            return self.state.lifetime.refusal()  # it was cut off
        else:
            metrics.UNSTEERED.inc()
            if report is None:
                stage, why = "report", "the workers have no report of the request"
            else:
                stage, why = "coverage", report.coverage
        return steering_failure(stage, why, self.request_id)

    def _note_readings(self, report: EngineReport) -> None:
        """Keep what the probes read at the last token of the prompt, unless there are several."""
        if report.sequences > (getattr(self.body, "n", None) or 1):
            return
        self._readings = profile_readings(self.steering.program, report.probes)
        self.state.readings.put(self.request_id, self._readings.values())


async def forget_response(raw_request: Request, response_id: str) -> None:
    """Drop a response that must not be served from vLLM's store of responses either."""
    handler = getattr(raw_request.app.state, "openai_serving_responses", None)
    if handler is not None:
        async with handler.response_store_lock:
            handler.response_store.pop(response_id, None)
