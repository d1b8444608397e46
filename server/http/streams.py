"""The `steering` object in streamed answers.

vLLM symbols relied on: chat and text completions stream strings, one server-sent event each, the
last `data: [DONE]`, an error as `data: {"error": ...}`; responses stream event objects that end
with `response.completed`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from headway.server.http import metrics
from headway.server.http.errors import error_body
from headway.server.http.exchange import Exchange
from headway.steering import Reason, SteeringError

DONE = "data: [DONE]\n\n"
ERROR = 'data: {"error"'
FINISH = 'finish_reason":"'
"""Marks a chunk that ends a choice. Inside a JSON string the quotes would be escaped."""
NO_CHOICES = '"choices":[]'
"""Marks the usage chunk, which follows the last choice."""


async def echo_in_chunks(
    exchange: Exchange, chunks: AsyncGenerator[str, None]
) -> AsyncGenerator[str, None]:
    """The stream with `steering` on its last JSON chunk, or an error event in that chunk's place.

    Only a chunk that may be the last is held back, until the next one shows whether it was.
    """
    held = ""
    outcome = "cancelled"
    try:
        async for chunk in chunks:
            if chunk == DONE:
                if outcome == "cancelled":
                    outcome = "ok"
                    try:
                        yield splice(held, await exchange.complete())
                    except SteeringError as error:
                        outcome = ended_by(exchange, error)
                        yield error_event(error)
                yield chunk
                continue
            if held:
                yield held
                held = ""
            if chunk.startswith(ERROR):
                failure = await exchange.recorded_failure()
                outcome = ended_by(exchange, failure) if failure else "error"
                yield error_event(failure) if failure else chunk
            elif FINISH in chunk or NO_CHOICES in chunk:
                held = chunk
            else:
                yield chunk
    finally:
        await chunks.aclose()
        exchange.close(outcome)


async def echo_in_events(
    exchange: Exchange, events: AsyncGenerator[Any, None]
) -> AsyncGenerator[str, None]:
    """The stream of a response with `steering` in its `response.completed` event."""
    outcome = "cancelled"
    number = 0
    try:
        async for event in events:
            number = getattr(event, "sequence_number", number)
            if event.type == "response.completed":
                event.response.steering = await exchange.complete()
                exchange.usage = event.response.usage
                outcome = "ok"
            payload = event.model_dump_json(indent=None, by_alias=True)
            yield f"event: {event.type}\ndata: {payload}\n\n"
    except Exception as raised:
        failure = raised if isinstance(raised, SteeringError) else await exchange.recorded_failure()
        outcome = ended_by(exchange, failure) if failure else "error"
        if failure is None:
            raise
        yield response_error_event(failure, number + 1)
    finally:
        await events.aclose()
        exchange.close(outcome)


def ended_by(exchange: Exchange, error: SteeringError) -> str:
    """The outcome of a stream that ends with an error of ours; what is no failure is counted here.

    There is no exception handler to do it: the answer has begun.
    """
    exchange.error = error
    if error.reason is Reason.STEERING_FAILED:
        return "failed"
    metrics.REFUSED.labels(reason=str(error.reason)).inc()
    return "error"


def splice(chunk: str, steering: dict[str, Any] | None) -> str:
    """A `data: {...}` chunk with one more key, put in without parsing the chunk."""
    if steering is None:
        return chunk
    tail = f'"steering":{json.dumps(steering, separators=(",", ":"))}}}\n\n'
    if not chunk:
        return f'data: {{"choices":[],{tail}'
    return f"{chunk.rstrip().removesuffix('}')},{tail}"


def error_event(error: SteeringError) -> str:
    """An error in a stream of chunks, in vLLM's form."""
    return f"data: {json.dumps(error_body(error))}\n\n"


def response_error_event(error: SteeringError, sequence_number: int) -> str:
    """An error in a stream of response events."""
    body = error_body(error)
    data = {
        "type": "error",
        "sequence_number": sequence_number,
        "code": body["error"]["reason"],
        "message": body["error"]["message"],
        "param": body["error"]["param"],
        **body,
    }
    return f"event: error\ndata: {json.dumps(data)}\n\n"
