"""Streams of completions as a benchmark reads them: tokens, times, and what is no answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from headway.benchmarks.completions import Completion, complete, parse, seconds_per_token
from headway.benchmarks.quality.client import EndpointError, UnsteeredAnswer

pytestmark = pytest.mark.unit


def event(seconds: float, **chunk: Any) -> tuple[float, str]:
    return seconds, json.dumps(chunk)


def tokens(*ids: int, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"text": "", "token_ids": list(ids), **fields}]}


def test_time_runs_from_the_first_token_to_the_end_of_the_stream() -> None:
    answer = parse(
        [
            event(1.0, choices=[{"text": ""}]),  # no token yet
            event(3.0, **tokens(5)),
            event(3.5, **tokens(6, 7)),
            event(4.0, **tokens(8, finish_reason="length"), steering={"methods": []}),
            (4.5, "[DONE]"),
        ]
    )
    assert answer == Completion([5, 6, 7, 8], 1, 1.5, {"methods": []})
    assert seconds_per_token([answer]) == pytest.approx(0.5)


def test_time_per_token_of_requests_made_together() -> None:
    answers = [Completion([1] * 11, 1, 1.0), Completion([1] * 7, 2, 2.0)]
    assert seconds_per_token(answers) == pytest.approx(3.0 / 15)
    with pytest.raises(ValueError, match="no request"):
        seconds_per_token([Completion([1, 2], 2, 1.0)])


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([event(1.0, **tokens(5))], "broke off"),
        ([(1.0, "[DONE]")], "without a token"),
        ([event(1.0, **tokens(5)), event(2.0, error={"message": "gone"})], "gone"),
    ],
)
def test_a_stream_that_is_no_answer(events: list[tuple[float, str]], message: str) -> None:
    with pytest.raises(EndpointError, match=message):
        parse(events)


@contextmanager
def endpoint(status: int, *chunks: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers every request with these chunks: its URL, and what it is asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write("".join(f"data: {chunk}\n\n" for chunk in chunks).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


STREAM = (json.dumps(tokens(5)), json.dumps(tokens(6)), "[DONE]")


async def ask(url: str, bodies: list[dict[str, Any]]) -> list[Completion]:
    # `complete` has an event loop of its own, and the tests run in one.
    return await asyncio.to_thread(complete, url, bodies)


async def test_requests_are_streamed_with_their_tokens() -> None:
    bodies = [{"prompt": [index], "max_tokens": 2} for index in range(3)]
    with endpoint(200, *STREAM) as (url, asked):
        answers = await ask(url, bodies)
    assert [each.token_ids for each in answers] == [[5, 6]] * 3
    assert sorted(each["prompt"] for each in asked) == [[0], [1], [2]]
    for body in asked:
        assert body["stream"] and body["return_token_ids"] and body["ignore_eos"]


@pytest.mark.parametrize(
    ("status", "fields", "error", "message"),
    [
        (400, {}, EndpointError, "HTTP 400"),
        (200, {"max_tokens": 3}, EndpointError, "2 tokens came, not 3"),
        (200, {"steering": {"methods": [{"method": "sgrs"}]}}, UnsteeredAnswer, "does not say"),
    ],
)
async def test_an_answer_that_is_no_measurement(
    status: int, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with endpoint(status, *STREAM) as (url, _), pytest.raises(error, match=message):
        await ask(url, [{"prompt": [1], "max_tokens": 2, **fields}])


async def test_a_server_that_is_gone() -> None:
    with endpoint(200) as (url, _):
        pass
    with pytest.raises(EndpointError, match="Connect"):
        await ask(url, [{"prompt": [1], "max_tokens": 2}])
