"""What the server tells about each request that asked for steering, once it has ended: a line of
the log, and where vLLM traces (`--otlp-traces-endpoint`) a span in the trace of vLLM's own.

vLLM symbols relied on: `ObservabilityConfig.otlp_traces_endpoint`; `init_tracer`, which makes the
tracer provider of the process the global one; `BaseServing._get_trace_headers`, which reads
`traceparent` from the headers of the request, and `OutputProcessor.do_tracing`, whose span
`llm_request` has what it names as parent. Of Starlette: `Request._headers`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import Scope

from headway.steering import Reason, SteeringError, SteeringProgram

LOGGER = logging.getLogger("headway.requests")

MAX_TEXT = 128
"""Characters of a text made by the client that are told."""

PLAIN = re.compile(r"[\w.:/@,+-]+", re.ASCII)
"""What stands in the log without quotes."""

SPAN = "headway.request"
PARTS = ("compile", "load", "confirm")
"""Of the time of a request: reading and compiling its steering, having the workers load its
vectors, and asking them whether it was steered."""

ATTRIBUTES = {
    "request_id": "gen_ai.request.id",
    "prompt_tokens": "gen_ai.usage.prompt_tokens",
    "output_tokens": "gen_ai.usage.completion_tokens",
}
"""Facts whose attribute has vLLM's name; the others are `headway.` and the name of the fact."""

REFUSED = "refused"


class Observation:
    """Follows one request, from when its steering is looked at until it ends."""

    def __init__(self, scope: Scope, tracer: Any = None) -> None:
        """tracer: OpenTelemetry's, None where nothing is traced."""
        self._scope = scope
        self._tracer = tracer
        self._span: Any = None
        self._began = time.time_ns()
        self._parts: list[tuple[str, int, int]] = []
        self._ended = False

    @classmethod
    def begin(cls, request: Request, tracer: Any = None) -> Observation:
        """The observation of a request, from now on."""
        begun = request.state.headway_observation = cls(request.scope, tracer)
        return begun

    @classmethod
    def of(cls, request: Request) -> Observation:
        """The observation of a request, a new one where none began."""
        return getattr(request.state, "headway_observation", None) or cls.begin(request)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one of `PARTS`."""
        started = time.time_ns()
        try:
            yield
        finally:
            self._parts.append((name, started, time.time_ns()))

    def trace(self, request: Request) -> None:
        """Begin the span, and make it the parent of vLLM's by the headers of the request."""
        if self._tracer is None:
            return
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        self._span = self._start_span(propagator.extract(dict(request.headers)))
        carrier: dict[str, str] = {}
        propagator.inject(carrier, set_span_in_context(self._span))
        headers = MutableHeaders(scope=request.scope)
        headers.update(carrier)
        request._headers = headers  # those that it read before are kept there

    def end(
        self, outcome: str, facts: Mapping[str, Any] | None = None, error: Exception | None = None
    ) -> None:
        """Tell how the request ended; only the first call counts.

        outcome: one of `metrics.OUTCOMES`; REFUSED if `error` is a SteeringError that is no failure
        of steering. facts: by name, None where there is none; no text of the request among them
        but its id.
        """
        if self._ended:
            return
        self._ended = True
        now = time.time_ns()
        told: dict[str, Any] = {"request_id": None, "path": shortened(self._scope.get("path"))}
        told |= {"outcome": outcome, "reason": None, **(facts or {})}
        if isinstance(error, SteeringError):
            told["reason"] = str(error.reason)
            if error.reason is not Reason.STEERING_FAILED:
                told["outcome"] = REFUSED
        told["request_id"] = shortened(told["request_id"] or self._header("x-request-id"))
        if self._parts:
            told["seconds"] = round((now - self._began) / 1e9, 6)
        told = {name: value for name, value in told.items() if value is not None}
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info("steering request: %s", as_text(told), extra={"headway": told})
        if self._tracer is not None:
            self._end_span(told, now)

    def _end_span(self, told: dict[str, Any], now: int) -> None:
        from opentelemetry.trace import StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if self._span is None:  # refused before vLLM saw it
            headers = {"traceparent": self._header("traceparent") or ""}
            self._span = self._start_span(TraceContextTextMapPropagator().extract(headers))
        context = set_span_in_context(self._span)
        for name, started, ended in self._parts:
            part = self._tracer.start_span(f"headway.{name}", context, start_time=started)
            part.end(ended)
        for name, value in told.items():
            if name != "seconds":  # which is how long the span is
                self._span.set_attribute(ATTRIBUTES.get(name, f"headway.{name}"), value)
        if told.get("reason") == Reason.STEERING_FAILED:
            self._span.set_status(StatusCode.ERROR, told["reason"])
        self._span.end(now)

    def _start_span(self, parent: Any) -> Any:
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(SPAN, parent, SpanKind.SERVER, start_time=self._began)

    def _header(self, name: str) -> str | None:
        wanted = name.encode()
        found = (value for key, value in self._scope.get("headers", ()) if key == wanted)
        return next((value.decode("latin-1") for value in found), None)


def facts_of(
    program: SteeringProgram, request_id: str | None, tokens: tuple[int, int], report: Any
) -> dict[str, Any]:
    """What is told about a request that was steered, or was about to be.

    tokens: of prompt and output. report: the `EngineReport`; None if the workers gave none.
    """
    facts: dict[str, Any] = {
        "request_id": request_id,
        "fingerprint": program.fingerprint,
        "methods": [applied.method for applied in program.applied],
        "prompt_tokens": tokens[0],
        "output_tokens": tokens[1],
    }
    if report is not None:
        facts["positions_edited"] = report.positions_edited
        facts["steering_seconds"] = round(report.seconds, 6)
        if program.sampling_gate is not None:
            for name in ("draws", "refusals", "fallbacks"):
                facts[f"sgrs_{name}"] = sum(each[name] for each in report.saliency)
    return facts


def tracer_of(vllm_config: Any) -> Any:
    """A tracer of the provider that vLLM has made; None where vLLM does not trace."""
    if vllm_config.observability_config.otlp_traces_endpoint is None:
        return None
    from opentelemetry import trace

    return trace.get_tracer("headway")


def shortened(text: str | None) -> str | None:
    """At most `MAX_TEXT` characters of a text."""
    return text if text is None or len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def as_text(facts: Mapping[str, Any]) -> str:
    """`name=value` for each fact; values are in JSON's quotes where they could be misread."""
    return " ".join(f"{name}={_as_word(value)}" for name, value in facts.items())


def _as_word(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ",".join(value)
    word = str(value)
    return word if PLAIN.fullmatch(word) else json.dumps(word)
