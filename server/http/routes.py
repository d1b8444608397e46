"""The steerable OpenAI routes, in the place of vLLM's: the same handlers, with a `steering` field.

vLLM symbols relied on: the route functions of `vllm.entrypoints.openai.*.api_router`, to which
every unsteered request goes unchanged; the serving objects on `app.state`; the decorators
`with_cancellation`, `load_aware_call`; `with_sse_keep_alive`, `metrics_header`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.responses import api_router as responses_router
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from headway.server.http.exchange import Exchange
from headway.server.http.observation import Observation
from headway.server.http.prompts import check_prompt
from headway.server.http.requests import (
    SteerableChatCompletionRequest,
    SteerableCompletionRequest,
    SteerableResponsesRequest,
)
from headway.server.http.state import steering_state
from headway.server.http.streams import echo_in_chunks, echo_in_events
from headway.steering import Reason, SteeringError

router = APIRouter()


@dataclass(frozen=True)
class Endpoint:
    """How one steerable route reaches vLLM's handler and encodes its answers."""

    path: str
    stock_route: Callable[[Any, Request], Any]
    serving: str  # name of the serving object on app.state
    create: str  # its method
    stream: Callable[[Exchange, Any], AsyncGenerator[str, None]]
    dump: dict[str, Any] = field(default_factory=dict)


CHAT = Endpoint(
    "/v1/chat/completions",
    chat_router.create_chat_completion,
    "openai_serving_chat",
    "create_chat_completion",
    echo_in_chunks,
)
COMPLETION = Endpoint(
    "/v1/completions",
    completion_router.create_completion,
    "openai_serving_completion",
    "create_completion",
    echo_in_chunks,
)
RESPONSES = Endpoint(
    "/v1/responses",
    responses_router.create_responses,
    "openai_serving_responses",
    "create_responses",
    echo_in_events,
    {"mode": "json", "by_alias": True},
)
ENDPOINTS = (CHAT, COMPLETION, RESPONSES)
STEERABLE_PATHS = frozenset(endpoint.path for endpoint in ENDPOINTS)

ROUTE: dict[str, Any] = {
    "dependencies": [Depends(validate_json_request)],
    "responses": {
        HTTPStatus.OK.value: {"content": {"text/event-stream": {}}},
        **{
            status.value: {"model": ErrorResponse}
            for status in (
                HTTPStatus.BAD_REQUEST,
                HTTPStatus.NOT_FOUND,
                HTTPStatus.REQUEST_TIMEOUT,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                HTTPStatus.TOO_MANY_REQUESTS,
                HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        },
    },
}


@router.post(CHAT.path, **ROUTE)
async def create_chat_completion(
    request: SteerableChatCompletionRequest, raw_request: Request
) -> Any:
    """Chat completion, maybe steered."""
    return await answer(CHAT, request, raw_request)


@router.post(COMPLETION.path, **ROUTE)
async def create_completion(request: SteerableCompletionRequest, raw_request: Request) -> Any:
    """Text completion, maybe steered."""
    return await answer(COMPLETION, request, raw_request)


@router.post(RESPONSES.path, **ROUTE)
async def create_responses(request: SteerableResponsesRequest, raw_request: Request) -> Any:
    """Response, maybe steered."""
    return await answer(RESPONSES, request, raw_request)


async def answer(endpoint: Endpoint, body: Any, raw_request: Request) -> Any:
    """vLLM's own route for an unsteered request, ours for a steered one."""
    state = steering_state(raw_request)
    observation = Observation.begin(raw_request, state.tracer)
    with observation.part("compile"):
        steering = await state.resolve_aside(body.steering, body.model, body)
    if steering is None:
        return await endpoint.stock_route(body, raw_request)
    body.model = steering.model
    # The parts of a message can be read only once from vLLM's request models; the JSON is kept.
    messages = check_prompt(steering.program, await raw_request.json())
    exchange = Exchange(state, steering, body, raw_request, messages, observation)
    return await answer_steered(exchange, raw_request, endpoint)


@with_cancellation
@load_aware_call
async def answer_steered(exchange: Exchange, raw_request: Request, endpoint: Endpoint) -> Response:
    """The answer of vLLM's handler, if the workers confirm that it was steered as asked."""
    exchange.open()
    outcome = "cancelled"
    try:
        await exchange.load()
        handler = getattr(raw_request.app.state, endpoint.serving)
        if handler is None:
            raise NotImplementedError(f"The model does not support {endpoint.path}")
        produced = await getattr(handler, endpoint.create)(exchange.body, raw_request)
        if isinstance(produced, AsyncGenerator):
            outcome = "streaming"
            args = getattr(raw_request.app.state, "args", None)
            keep_alive = float(getattr(args, "sse_keep_alive_interval", 0))
            return SteeredStream(exchange, endpoint.stream(exchange, produced), keep_alive)
        if isinstance(produced, ErrorResponse):
            # On cancellation vLLM's handlers return an error that nobody will read.
            outcome = "cancelled" if _is_cancelled() else "error"
            if outcome == "error" and (failure := await exchange.recorded_failure()):
                raise failure
            return JSONResponse(
                produced.model_dump(**endpoint.dump), status_code=produced.error.code
            )
        response = await _confirmed(exchange, raw_request, produced, endpoint)
        outcome = "ok"
        return response
    except SteeringError as error:
        exchange.error = error
        outcome = "failed" if error.reason is Reason.STEERING_FAILED else "error"
        raise
    except Exception as raised:
        outcome = "error"
        failure = await exchange.recorded_failure()
        if failure is None:
            raise
        outcome = "failed"
        raise failure from raised
    finally:
        if outcome != "streaming":
            exchange.close(outcome)


async def _confirmed(
    exchange: Exchange, raw_request: Request, produced: Any, endpoint: Endpoint
) -> Response:
    steering = await exchange.complete()
    exchange.usage = produced.usage
    if steering is not None:
        # vLLM's response models allow extra keys; a stored response then shows it later too.
        produced.steering = steering
    load_format = raw_request.headers.get("endpoint-load-metrics-format", "")
    headers = {**exchange.headers, **(metrics_header(load_format) or {})}
    return JSONResponse(produced.model_dump(**endpoint.dump), headers=headers)


class SteeredStream(StreamingResponse):
    """A stream that ends its exchange however it ends, even if it never began."""

    def __init__(
        self, exchange: Exchange, chunks: AsyncGenerator[str, None], keep_alive_seconds: float
    ) -> None:
        super().__init__(
            with_sse_keep_alive(chunks, keep_alive_seconds),
            media_type="text/event-stream",
            headers=exchange.headers,
        )
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then release what is left of it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                # Of a stream cut off between two chunks vLLM's generators, which abort the
                # request, would otherwise wait for the garbage collector.
                await self.body_iterator.aclose()  # type: ignore[attr-defined]
            finally:
                self._exchange.close("cancelled")


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
