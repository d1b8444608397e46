"""Where a stream shows its steering."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from headway.server.http import metrics
from headway.server.http.streams import DONE, echo_in_chunks, echo_in_events, splice
from headway.steering import Reason, SteeringError

pytestmark = pytest.mark.unit

ECHO = {"fingerprint": "f", "methods": []}
FAILED = SteeringError(Reason.STEERING_FAILED, "steering failed at stage x: y (request 1)")
ENDED = SteeringError(Reason.UNAVAILABLE, "the server is ending; send the request again")


class FakeExchange:
    """An exchange whose workers answer as told."""

    def __init__(self, echo: Any = ECHO, failure: SteeringError | None = None) -> None:
        self.echo = echo
        self.failure = failure
        self.outcomes: list[str] = []
        self.usage: Any = None
        self.error: SteeringError | None = None

    async def complete(self) -> Any:
        if isinstance(self.echo, SteeringError):
            raise self.echo
        return self.echo

    async def recorded_failure(self) -> SteeringError | None:
        return self.failure

    def close(self, outcome: str) -> None:
        self.outcomes.append(outcome)


def chunk(text: str = "", finish: str | None = None, index: int = 0) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'id': '1', 'choices': [choice]}, separators=(',', ':'))}\n\n"


USAGE = 'data: {"id":"1","choices":[],"usage":{"prompt_tokens":1}}\n\n'
VLLM_ERROR = 'data: {"error": {"message": "Internal server error"}}\n\n'


async def stream(*chunks: Any) -> AsyncGenerator[Any, None]:
    for item in chunks:
        yield item


async def run(exchange: FakeExchange, *chunks: str) -> list[str]:
    return [item async for item in echo_in_chunks(exchange, stream(*chunks))]  # type: ignore[arg-type]


def steering_of(item: str) -> Any:
    return json.loads(item.removeprefix("data: ")).get("steering")


async def test_the_last_json_chunk_has_it() -> None:
    exchange = FakeExchange()
    answer = await run(exchange, chunk("a"), chunk("b", "stop"), DONE)
    assert answer[0] == chunk("a")
    assert steering_of(answer[1]) == ECHO
    assert answer[2:] == [DONE]
    assert exchange.outcomes == ["ok"]


async def test_with_usage_the_usage_chunk_is_the_last() -> None:
    answer = await run(FakeExchange(), chunk("a", "stop"), USAGE, DONE)
    assert answer[0] == chunk("a", "stop")
    assert steering_of(answer[1]) == ECHO


async def test_with_several_choices_only_the_last_end_has_it() -> None:
    ends = chunk("a", "stop", 1), chunk("b"), chunk("c", "length")
    answer = await run(FakeExchange(), *ends, DONE)
    assert [steering_of(item) for item in answer[:3]] == [None, None, ECHO]


async def test_a_chunk_that_cannot_be_last_is_not_held_back() -> None:
    seen: list[str] = []

    async def source() -> AsyncGenerator[str, None]:
        yield chunk('he said "finish_reason":"stop" and "choices":[]')
        seen.append("asked for more")
        yield DONE

    answer = echo_in_chunks(FakeExchange(), source())  # type: ignore[arg-type]
    await anext(answer)
    assert not seen
    await answer.aclose()


async def test_a_stream_without_an_end_still_shows_it() -> None:
    answer = await run(FakeExchange(), chunk("a"), DONE)
    assert steering_of(answer[1]) == ECHO


async def test_report_none_leaves_the_stream_as_it_is() -> None:
    chunks = chunk("a"), chunk("b", "stop"), DONE
    assert await run(FakeExchange(echo=None), *chunks) == list(chunks)


async def test_an_unconfirmed_stream_ends_in_an_error() -> None:
    exchange = FakeExchange(echo=FAILED)
    answer = await run(exchange, chunk("a"), chunk("b", "stop"), DONE)
    error = json.loads(answer[1].removeprefix("data: "))["error"]
    assert (error["reason"], error["code"]) == ("E_STEERING_FAILED", 500)
    assert answer[2] == DONE
    assert exchange.outcomes == ["failed"]


@pytest.mark.parametrize("error", [ENDED, FAILED], ids=["ended", "failed"])
@pytest.mark.parametrize("events", [False, True], ids=["chunks", "events"])
async def test_a_stream_that_the_end_of_the_server_cuts_off_is_no_failure(
    error: SteeringError, events: bool
) -> None:
    refusals = metrics.REFUSED.labels(reason=str(error.reason))._value
    before = refusals.get()
    exchange = FakeExchange(echo=error)
    if events:
        source = echo_in_events(exchange, stream(completed()))  # type: ignore[arg-type]
        answer = [item async for item in source]
    else:
        answer = await run(exchange, chunk("b", "stop"), DONE)
    assert str(error.reason) in answer[0]
    assert exchange.error is error
    assert exchange.outcomes == ["failed" if error is FAILED else "error"]
    assert refusals.get() == before + (error is ENDED)


@pytest.mark.parametrize("failure", [None, FAILED])
async def test_an_error_of_the_engine(failure: SteeringError | None) -> None:
    exchange = FakeExchange(failure=failure)
    answer = await run(exchange, chunk("a"), VLLM_ERROR, DONE)
    error = json.loads(answer[1].removeprefix("data: "))["error"]
    assert error.get("reason") == (failure and "E_STEERING_FAILED")
    assert len(answer) == 3
    assert exchange.outcomes == ["failed" if failure else "error"]


async def test_a_client_that_leaves_closes_the_exchange() -> None:
    exchange = FakeExchange()
    answer = echo_in_chunks(exchange, stream(chunk("a"), chunk("b"), DONE))  # type: ignore[arg-type]
    await anext(answer)
    await answer.aclose()
    assert exchange.outcomes == ["cancelled"]


def test_splice_keeps_every_other_byte() -> None:
    assert splice(USAGE, {"a": 1}) == USAGE.replace("}}\n\n", '},"steering":{"a":1}}\n\n')


class Event(SimpleNamespace):
    """A response event as far as the stream looks at it."""

    def model_dump_json(self, **_: Any) -> str:
        response = vars(self).get("response")
        return json.dumps({"type": self.type, "response": response and vars(response)})


def completed() -> Event:
    return Event(type="response.completed", sequence_number=3, response=SimpleNamespace(usage=None))


async def test_a_response_shows_it_when_completed() -> None:
    exchange = FakeExchange()
    events = stream(Event(type="response.created", sequence_number=0), completed())
    answer = [item async for item in echo_in_events(exchange, events)]  # type: ignore[arg-type]
    event, _, data = answer[-1].partition("\ndata: ")
    assert event == "event: response.completed"
    assert json.loads(data)["response"]["steering"] == ECHO
    assert exchange.outcomes == ["ok"]


async def test_an_unconfirmed_response_ends_in_an_error() -> None:
    exchange = FakeExchange(echo=FAILED)
    answer = [item async for item in echo_in_events(exchange, stream(completed()))]  # type: ignore[arg-type]
    data = json.loads(answer[-1].partition("data: ")[2])
    assert len(answer) == 1
    assert (data["type"], data["code"], data["sequence_number"]) == (
        "error",
        "E_STEERING_FAILED",
        4,
    )
    assert data["error"]["reason"] == "E_STEERING_FAILED"
    assert exchange.outcomes == ["failed"]
