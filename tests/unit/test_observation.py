"""The log line and the spans of a request that asked for steering, however it ends."""

from __future__ import annotations

import inspect
import io
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pythonjsonlogger.json import JsonFormatter
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.logging_utils import NewLineFormatter
from vllm.logging_utils.formatter import JSON_FORMAT
from vllm.tracing import SpanAttributes, extract_trace_context, extract_trace_headers
from vllm.v1.engine.output_processor import OutputProcessor

from headway.server.engine import logs
from headway.server.engine.report import EngineReport
from headway.server.http import routes
from headway.server.http.errors import steering_error_handler
from headway.server.http.guard import SteeringGuard
from headway.server.http.observation import (
    ATTRIBUTES,
    LOGGER,
    MAX_TEXT,
    facts_of,
    tracer_of,
)
from headway.server.http.state import SteeringState
from headway.steering import ModelGeometry, SteeringError, compile_spec, parse_spec

pytestmark = pytest.mark.unit

SECRET = "a prompt that nobody may read"
STEERED = {"methods": [{"method": "head_ablation", "heads": [[1, 2]]}]}
SAMPLED = {"methods": [{"method": "sgrs", "layers": [1, 2]}]}
WHOLE = EngineReport(sequences=1, positions_computed=9, positions_edited=9, seconds=0.0125)
COUNTED = {"draws": 12, "refusals": 7, "fallbacks": 1, "tokens": []}
FAILED = EngineReport(1, 9, 3, "edit", "ValueError: x")
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
USAGE = UsageInfo(prompt_tokens=4, completion_tokens=5, total_tokens=9)


class FakeServing:
    """vLLM's serving handler, with the span that vLLM would make of the request's headers."""

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        request_id = f"chatcmpl-{request.request_id}"
        raw_request.state.request_metadata = SimpleNamespace(
            request_id=request_id, final_usage_info=USAGE
        )
        request.to_sampling_params(4, {})
        context = extract_trace_context(extract_trace_headers(raw_request.headers))
        self.tracer.start_span("llm_request", context).end()
        if request.stream:
            return self._stream()
        return ChatCompletionResponse(id=request_id, model="base", choices=[], usage=USAGE)

    async def _stream(self) -> AsyncGenerator[str, None]:
        yield 'data: {"id":"c","choices":[{"finish_reason":"stop"}]}\n\n'
        yield "data: [DONE]\n\n"


class Served:
    """A server whose workers answer with one report; its log, and its spans by name."""

    def __init__(self, log: io.StringIO, report: EngineReport | None = WHOLE) -> None:
        self._log = log
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        tracer = provider.get_tracer("test")

        async def pop_report(report_id: str) -> EngineReport | None:
            return report

        config = SimpleNamespace(
            speculative_config=None,
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        )
        models = SimpleNamespace(is_base_model=lambda name: name == "base", lora_requests={})
        client: Any = SimpleNamespace(pop_report=pop_report)
        self.app = FastAPI()
        self.app.include_router(routes.router)
        self.app.add_exception_handler(SteeringError, steering_error_handler)
        self.app.add_middleware(SteeringGuard, steerable=routes.STEERABLE_PATHS)
        init_exception_handler(self.app)
        geometry = ModelGeometry(4, 4, 2, 64, 256)
        state = SteeringState(config, geometry, client, models)  # type: ignore[arg-type]
        state.tracer = tracer
        self.app.state.headway = state
        self.app.state.openai_serving_chat = FakeServing(tracer)
        self.app.state.args = SimpleNamespace(log_error_stack=False)

    async def post(
        self, path: str = "/v1/chat/completions", headers: Any = None, **fields: Any
    ) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": SECRET}], **fields}
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)

    def line(self) -> dict[str, Any]:
        """The fields of the only line of the log."""
        (line,) = self._log.getvalue().splitlines()
        assert SECRET not in line
        fields: dict[str, Any] = json.loads(line)["headway"]
        return fields

    def spans(self) -> dict[str, Any]:
        """The spans that ended."""
        return {span.name: span for span in self._exporter.get_finished_spans()}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What vLLM's JSON formatter makes of the log of requests."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(JSON_FORMAT))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield stream
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


async def test_a_steered_answer_is_told(log: io.StringIO) -> None:
    served = Served(log)
    answer = await served.post(steering=STEERED)
    assert answer.status_code == 200, answer.text
    line = served.line()
    assert 0 < line.pop("seconds") < 60
    assert line.pop("fingerprint") == answer.headers["x-headway-fingerprint"]
    assert line.pop("request_id") == answer.json()["id"]
    assert line == {
        "path": "/v1/chat/completions",
        "outcome": "ok",
        "methods": ["head_ablation"],
        "prompt_tokens": 4,
        "output_tokens": 5,
        "positions_edited": 9,
        "steering_seconds": 0.0125,
    }


async def test_the_spans_stand_in_the_trace_of_the_client_and_around_vllms(
    log: io.StringIO,
) -> None:
    served = Served(log)
    answer = await served.post(headers={"traceparent": PARENT}, steering=STEERED)
    spans = served.spans()
    assert spans.keys() == {
        *("headway.request", "headway.compile", "headway.confirm"),
        "llm_request",
    }
    ours = spans["headway.request"]
    assert format(ours.parent.span_id, "016x") == "b7ad6b7169203331"
    for name, span in spans.items():
        assert format(span.context.trace_id, "032x") == TRACE
        if span is not ours:
            assert span.parent.span_id == ours.context.span_id
        if name != "llm_request":
            assert ours.start_time <= span.start_time <= span.end_time <= ours.end_time
    attributes = dict(ours.attributes)
    assert attributes["headway.fingerprint"] == answer.headers["x-headway-fingerprint"]
    assert attributes["headway.methods"] == ("head_ablation",)
    assert attributes["headway.outcome"] == "ok"
    assert attributes["headway.steering_seconds"] == 0.0125
    assert attributes["gen_ai.request.id"] == answer.json()["id"]
    assert attributes["gen_ai.usage.completion_tokens"] == 5
    assert ours.status.is_unset


async def test_without_a_trace_of_the_client_a_new_one_begins(log: io.StringIO) -> None:
    served = Served(log)
    await served.post(headers={"traceparent": "nonsense"}, steering=STEERED)
    spans = served.spans()
    assert spans["headway.request"].parent is None
    assert spans["llm_request"].parent.span_id == spans["headway.request"].context.span_id


def test_what_sgrs_did_is_told() -> None:
    program = compile_spec(parse_spec(SAMPLED), ModelGeometry(4, 4, 2, 64, 256))
    report = EngineReport(2, 9, 0, saliency=[COUNTED, COUNTED])
    facts = facts_of(program, "cmpl-1", (4, 5), report)
    assert {name: facts[name] for name in facts if name.startswith("sgrs_")} == {
        "sgrs_draws": 24,
        "sgrs_refusals": 14,
        "sgrs_fallbacks": 2,
    }
    assert "steering_seconds" not in facts_of(program, None, (0, 0), None)


async def test_a_stream_is_told_when_it_ends(log: io.StringIO) -> None:
    served = Served(log)
    await served.post(steering=STEERED, stream=True)
    assert served.line()["outcome"] == "ok"
    assert served.line()["output_tokens"] == 5
    assert served.spans()["headway.request"].attributes["headway.outcome"] == "ok"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_told(log: io.StringIO, stream: bool) -> None:
    served = Served(log, FAILED)
    await served.post(steering=STEERED, stream=stream)
    line = served.line()
    assert (line["outcome"], line["reason"]) == ("failed", "E_STEERING_FAILED")
    assert not served.spans()["headway.request"].status.is_ok
    assert served.spans()["headway.request"].status.status_code.name == "ERROR"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"steering": {"methods": [{"method": SECRET}]}}, "E_UNKNOWN_METHOD"),
        ({"steering": {SECRET: 1}}, "E_BAD_PARAM"),
        ({"steering": {"methods": [{"method": "vhr", "heads": [[9, 0]]}]}}, "E_LAYER_RANGE"),
    ],
)
async def test_a_refusal_is_told_without_what_was_asked(
    log: io.StringIO, fields: Any, reason: str
) -> None:
    served = Served(log)
    headers = {"x-request-id": "mine", "traceparent": PARENT}
    answer = await served.post(headers=headers, **fields)
    assert answer.json()["error"]["reason"] == reason
    line = served.line()
    assert line.pop("seconds") < 60
    assert line == {
        "request_id": "mine",
        "path": "/v1/chat/completions",
        "outcome": "refused",
        "reason": reason,
    }
    spans = served.spans()
    assert spans.keys() == {"headway.request", "headway.compile"}
    assert format(spans["headway.request"].context.trace_id, "032x") == TRACE
    assert spans["headway.request"].attributes["headway.reason"] == reason


async def test_steering_where_none_is_possible_is_told(log: io.StringIO) -> None:
    served = Served(log)
    answer = await served.post("/v1/embeddings", steering=STEERED)
    assert answer.status_code == 400
    assert served.line() == {
        "path": "/v1/embeddings",
        "outcome": "refused",
        "reason": answer.json()["error"]["reason"],
    }


async def test_an_unsteered_request_is_not_told(log: io.StringIO) -> None:
    served = Served(log)
    await served.post(headers={"traceparent": PARENT})
    assert log.getvalue() == ""
    (span,) = served.spans().values()
    assert span.name == "llm_request"
    assert format(span.parent.span_id, "016x") == "b7ad6b7169203331", "as the client sent it"


async def test_nothing_that_a_client_wrote_breaks_a_line(log: io.StringIO) -> None:
    """In vLLM's text format; JSON escapes by itself."""
    (handler,) = LOGGER.handlers
    handler.setFormatter(NewLineFormatter("%(levelname)s [%(fileinfo)s] %(message)s"))
    served = Served(log)
    forged = 'x outcome=failed\nINFO "forged\u2028\x1b[31m' + "y" * 500
    await served.post(steering=STEERED, request_id=forged)
    (line,) = log.getvalue().splitlines()
    assert line.isascii() and line.isprintable()
    assert line.count(" outcome=") == 2 and line.endswith("=0.0125 " + line.split()[-1])
    assert line.startswith('INFO [observation.py] steering request: request_id="chatcmpl-x outc')
    assert '\\nINFO \\"forged\\u2028\\u001b[31m' in line
    assert len(line) < 3 * MAX_TEXT + 200


async def test_a_switched_off_log_is_silent(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "disabled", True)
    served = Served(log)
    await served.post(steering=STEERED)
    assert log.getvalue() == ""
    assert "headway.request" in served.spans()


def test_there_is_a_tracer_only_where_vllm_traces() -> None:
    def config(endpoint: str | None) -> Any:
        return SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=endpoint))

    assert tracer_of(config(None)) is None
    assert tracer_of(config("http://127.0.0.1:1/v1/traces")) is not None


def test_vllms_span_is_made_of_the_headers_of_the_request() -> None:
    """Otherwise it would not stand below ours."""
    source = inspect.getsource(OutputProcessor.do_tracing)
    assert "extract_trace_context(engine_core_output.trace_headers)" in source
    assert 'span_name="llm_request"' in source
    serving = (OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses)
    for handler in serving:
        source = inspect.getsource(inspect.getmodule(handler))  # type: ignore[arg-type]
        assert "self._get_trace_headers(raw_request.headers)" in source, handler
    ours = set(ATTRIBUTES.values())
    assert ours <= {value for value in vars(SpanAttributes).values() if isinstance(value, str)}


class Loggers:
    """The loggers of Headway and vLLM, without what this process has set up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        manager = logging.Manager(logging.RootLogger(logging.WARNING))
        self.ours, self.vllm = manager.getLogger("headway"), manager.getLogger("vllm")
        self.root = manager.root
        self.requests = manager.getLogger("headway.requests")
        self.written = io.StringIO()
        monkeypatch.setattr(logs, "OURS", self.ours)
        monkeypatch.setattr(logs, "VLLM", self.vllm)

    def set_up_vllm(self, level: int) -> None:
        handler = logging.StreamHandler(self.written)
        handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.vllm.handlers = [handler]
        self.vllm.propagate = False
        self.vllm.setLevel(level)


def test_the_log_goes_where_vllms_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = Loggers(monkeypatch)
    loggers.set_up_vllm(logging.INFO)
    logs.write_as_vllm()
    logs.write_as_vllm()
    loggers.requests.info("one")
    assert loggers.written.getvalue() == "headway.requests one\n"
    loggers.set_up_vllm(logging.WARNING)  # anew, with another handler
    logs.write_as_vllm()
    loggers.requests.info("two")
    loggers.requests.warning("three")
    assert loggers.written.getvalue() == "headway.requests one\nheadway.requests three\n"


@pytest.mark.parametrize("where", ["root", "ours"])
def test_a_log_that_was_set_up_is_left_alone(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    loggers = Loggers(monkeypatch)
    loggers.set_up_vllm(logging.INFO)
    own = logging.StreamHandler(io.StringIO())
    getattr(loggers, where).addHandler(own)
    logs.write_as_vllm()
    loggers.requests.error("mine")
    assert loggers.written.getvalue() == "" and "mine" in own.stream.getvalue()


def test_without_vllms_log_there_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = Loggers(monkeypatch)
    logs.write_as_vllm()
    assert not loggers.ours.handlers and loggers.ours.level == logging.NOTSET
