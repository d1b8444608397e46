"""The steerable routes around a stand-in for vLLM's serving handler."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, UsageInfo
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import GenerationError

from headway.server.engine.report import EngineReport
from headway.server.http import metrics, routes
from headway.server.http.errors import steering_error_handler
from headway.server.http.state import SteeringState
from headway.steering import EXTRA_ARG, ModelGeometry, SteeringError

pytestmark = pytest.mark.unit

STEERED = {"methods": [{"method": "head_ablation", "heads": [[1, 2]]}]}
WHOLE = EngineReport(sequences=1, positions_computed=9, positions_edited=9)
FAILED = EngineReport(1, 9, 3, "edit", "ValueError: x")
VLLM_ERROR = ErrorResponse(error=ErrorInfo(message="no", type="NotFoundError", code=404))
LAST = 'data: {"id":"c","choices":[{"finish_reason":"stop"}]}\n\n'
USAGE = UsageInfo(prompt_tokens=4, completion_tokens=5, total_tokens=9)


class FakeServing:
    """Answers a chat request as told, after drawing its sampling parameters like vLLM."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.params: Any = None

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        raw_request.state.request_metadata = SimpleNamespace(
            request_id="chatcmpl-1", final_usage_info=USAGE
        )
        if isinstance(self.answer, ErrorResponse):
            return self.answer
        self.params = request.to_sampling_params(4, {})
        if isinstance(self.answer, Exception):
            raise self.answer
        if request.stream:
            return self._stream()
        return ChatCompletionResponse(id="chatcmpl-1", model=request.model, choices=[], usage=USAGE)

    async def _stream(self) -> AsyncGenerator[str, None]:
        yield LAST
        yield "data: [DONE]\n\n"


class FakeWorkers:
    """Workers with one report for whoever asks."""

    def __init__(self, report: EngineReport | None) -> None:
        self.report = report
        self.asked = 0

    async def pop_report(self, report_id: str) -> EngineReport | None:
        self.asked += 1
        return self.report


def make_app(answer: Any = None, report: EngineReport | None = WHOLE) -> FastAPI:
    app = FastAPI()
    app.include_router(routes.router)
    app.add_exception_handler(SteeringError, steering_error_handler)
    init_exception_handler(app)
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    config = SimpleNamespace(speculative_config=None, parallel_config=parallel)
    models = SimpleNamespace(is_base_model=lambda name: name == "base", lora_requests={})
    client: Any = FakeWorkers(report)
    app.state.headway = SteeringState(config, ModelGeometry(4, 4, 2, 64, 256), client, models)  # type: ignore[arg-type]
    app.state.openai_serving_chat = FakeServing(answer)
    app.state.args = SimpleNamespace(log_error_stack=False)
    return app


async def post(app: FastAPI, **fields: Any) -> httpx.Response:
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/chat/completions", json=body)


async def test_an_unsteered_request_takes_the_stock_route() -> None:
    app = make_app()
    response = await post(app, vllm_xargs={"other": 1})
    assert response.status_code == 200
    assert "steering" not in response.json()
    assert "x-headway-fingerprint" not in response.headers
    assert app.state.openai_serving_chat.params.extra_args == {"other": 1}
    assert app.state.headway.client.asked == 0


async def test_a_steered_request_carries_its_program() -> None:
    app = make_app()
    response = await post(app, steering=STEERED)
    assert response.status_code == 200
    steering = response.json()["steering"]
    carried = app.state.openai_serving_chat.params.extra_args[EXTRA_ARG]
    assert carried.program.fingerprint == steering["fingerprint"]
    assert response.headers["x-headway-fingerprint"] == steering["fingerprint"]


async def test_what_the_endpoint_ignores_may_be_deep() -> None:
    app = make_app()

    async def create_completion(request: Any, raw_request: Any) -> Any:
        request.to_sampling_params(4, {})
        return VLLM_ERROR

    app.state.openai_serving_completion = SimpleNamespace(create_completion=create_completion)
    plain = json.dumps({"model": "base", "prompt": "hi", "steering": STEERED})
    body = f'{plain[:-1]}, "messages": {"[" * 500}{"]" * 500}}}'
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == VLLM_ERROR.error.code, answer.text


@pytest.mark.parametrize(("report", "stage"), [(None, "report"), (FAILED, "edit")])
async def test_an_unconfirmed_answer_is_a_500(report: EngineReport | None, stage: str) -> None:
    response = await post(make_app(report=report), steering=STEERED)
    error = response.json()["error"]
    assert response.status_code == error["code"] == 500
    assert error["reason"] == "E_STEERING_FAILED"
    assert f"stage {stage}" in error["message"] and "chatcmpl-1" in error["message"]
    metrics.UNSTEERED.reset()


@pytest.mark.parametrize("report", [WHOLE, FAILED])
async def test_a_generation_error_is_explained(report: EngineReport) -> None:
    app = make_app(GenerationError("Internal server error"), report)
    response = await post(app, steering=STEERED)
    error = response.json()["error"]
    assert response.status_code == 500
    assert error.get("reason") == ("E_STEERING_FAILED" if report is FAILED else None)


async def test_errors_of_vllm_stay_as_they_are() -> None:
    app = make_app(VLLM_ERROR)
    response = await post(app, steering=STEERED)
    assert response.status_code == 404
    assert response.json() == VLLM_ERROR.model_dump()
    assert app.state.headway.client.asked == 0


@pytest.mark.parametrize("report", [WHOLE, FAILED])
async def test_a_stream(report: EngineReport) -> None:
    response = await post(make_app(report=report), steering=STEERED, stream=True)
    assert response.headers["x-headway-fingerprint"]
    first, done = response.text.split("\n\n")[:2]
    data = json.loads(first.removeprefix("data: "))
    assert ("steering" in data) is (report is WHOLE)
    assert ("error" in data) is (report is FAILED)
    assert done == "data: [DONE]"


async def test_every_end_is_counted_once() -> None:
    def ends() -> float:
        samples = (sample for family in metrics.REQUESTS.collect() for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))

    before, active = ends(), metrics.ACTIVE._value.get()
    await post(make_app(), steering=STEERED)
    await post(make_app(), steering=STEERED, stream=True)
    await post(make_app(report=FAILED), steering=STEERED)
    await post(make_app(VLLM_ERROR), steering=STEERED)
    assert ends() == before + 4
    assert metrics.ACTIVE._value.get() == active


async def test_a_client_that_does_not_read_holds_up_its_own_stream_only() -> None:
    """Nothing is collected for it: the next chunk is asked for when the last one has left."""
    pulled, ended, outcomes = 0, asyncio.Event(), []

    async def chunks() -> AsyncGenerator[str, None]:
        nonlocal pulled
        try:
            while True:
                pulled += 1
                yield "data: x\n\n"
        finally:
            ended.set()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # its buffers are full

    async def receive() -> Any:
        return await asyncio.Event().wait()

    exchange: Any = SimpleNamespace(headers={}, close=outcomes.append)
    stream = routes.SteeredStream(exchange, chunks(), 0.0)
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    serving = asyncio.create_task(stream(scope, receive, send))
    await asyncio.sleep(0.05)
    assert pulled == 1 and not serving.done()
    serving.cancel()  # as uvicorn does where the wait for connections is over
    await asyncio.wait({serving}, timeout=2)
    assert serving.done() and ended.is_set() and outcomes == ["cancelled"]
