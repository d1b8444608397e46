"""How `headway bench soak` sends requests and judges answers, against a small server in process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from headway.benchmarks import soak_load
from headway.benchmarks.soak_answers import FINGERPRINT_HEADER, Answer, Compiled, Problem, judge
from headway.benchmarks.soak_asks import CHAT, COMPLETIONS, RESPONSES, Ask, Expected, Place
from headway.benchmarks.soak_load import Driver
from headway.steering import ModelGeometry

pytestmark = pytest.mark.unit

FINGERPRINT = "f" * 64
STEERING = {"fingerprint": FINGERPRINT, "methods": [{"method": "vhr"}]}
SPEC = {"methods": [{"method": "vhr", "heads": [[0, 0]]}]}
COMPILED = Compiled(FINGERPRINT, ("vhr",))
PLAIN = Ask("plain", CHAT, {"messages": [], "n": 2})
STEERED = Ask("steered", CHAT, {"messages": [], "steering": SPEC}, steered=True)
REFUSED = Ask("bad", CHAT, {}, expected=Expected((400,), "E_BAD_PARAM", "steering.x"))


class Fake:
    """Answers chat as told, and counts how many requests it has at a time.

    echo: what the answer shows of a steered request; wait: seconds until it comes.
    """

    def __init__(self) -> None:
        self.status = 200
        self.echo: dict[str, Any] | None = STEERING
        self.header: str | None = FINGERPRINT
        self.wait = 0.0
        self.ending = "data: [DONE]\n\n"
        self.error = {"reason": "E_BAD_PARAM", "param": "steering.x", "message": "no"}
        self.running = self.most = 0
        self.seen: list[dict[str, Any]] = []
        self.app = Starlette(
            routes=[
                Route("/v1/steering/compile", self.compile, methods=["POST"]),
                Route(CHAT, self.chat, methods=["POST"]),
                Route(COMPLETIONS, self.chat, methods=["POST"]),
                Route(RESPONSES, self.chat, methods=["POST"]),
            ]
        )

    async def compile(self, request: Request) -> Response:
        return JSONResponse(STEERING)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append({"body": body, "headers": dict(request.headers)})
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.wait)
        self.running -= 1
        if self.status != 200:
            return JSONResponse({"error": self.error}, self.status)
        steered = "steering" in body
        headers = {FINGERPRINT_HEADER: self.header} if steered and self.header else {}
        if body.get("stream"):
            return StreamingResponse(
                self.chunks(steered), headers=headers, media_type="text/event-stream"
            )
        choices = [{"index": index} for index in range(body.get("n", 1))]
        shown = {"steering": self.echo} if steered and self.echo else {}
        return JSONResponse({"choices": choices, **shown}, headers=headers)

    async def chunks(self, steered: bool) -> AsyncIterator[str]:
        for _ in range(3):
            yield 'data: {"choices":[{"index":0}]}\n\n'
        last: dict[str, Any] = {"choices": []}
        if steered and self.echo:
            last["steering"] = self.echo
        yield f"data: {json.dumps(last)}\n\n"
        yield self.ending


@pytest.fixture
def fake() -> Iterator[Fake]:
    yield Fake()


@pytest.fixture
async def driver(fake: Fake) -> AsyncIterator[Driver]:
    transport = httpx.ASGITransport(app=fake.app, raise_app_exceptions=False)
    async with Driver("http://test", "key", {"Authorization": "Bearer a"}, transport) as made:
        yield made


def stream(ask: Ask) -> Ask:
    return replace(ask, body={**ask.body, "stream": True, "n": 1})


@pytest.mark.parametrize("ask", [PLAIN, STEERED, stream(PLAIN), stream(STEERED)])
async def test_a_good_answer_has_no_problem(driver: Driver, ask: Ask) -> None:
    outcome = await driver.ask(ask)
    assert outcome.problem is None and outcome.status == 200, outcome
    assert (outcome.first is not None) == ask.is_stream
    assert driver.outcomes == [outcome]


@pytest.mark.parametrize("ask", [STEERED, stream(STEERED)])
@pytest.mark.parametrize(
    "echo", [None, {**STEERING, "fingerprint": "e" * 64}, {**STEERING, "methods": []}]
)
async def test_a_steered_answer_must_show_it(
    fake: Fake, driver: Driver, ask: Ask, echo: dict[str, Any] | None
) -> None:
    fake.echo = echo
    assert (await driver.ask(ask)).problem is Problem.ECHO


async def test_the_header_must_show_it_too(fake: Fake, driver: Driver) -> None:
    fake.header = None
    assert (await driver.ask(STEERED)).problem is Problem.ECHO


async def test_an_unsteered_answer_must_not(fake: Fake, driver: Driver) -> None:
    ask = replace(STEERED, steered=False)
    assert (await driver.ask(ask)).problem is Problem.TRACE


async def test_a_stream_must_have_its_end(fake: Fake, driver: Driver) -> None:
    fake.ending = ""
    assert (await driver.ask(stream(PLAIN))).problem is Problem.INCOMPLETE


@pytest.mark.parametrize(("code", "problem"), [(500, "unexpected 5xx"), (429, Problem.REFUSED)])
async def test_a_stream_that_ends_with_an_error(
    fake: Fake, driver: Driver, code: int, problem: str
) -> None:
    fake.ending = f'data: {{"error":{{"code":{code},"message":"x"}}}}\n\ndata: [DONE]\n\n'
    assert (await driver.ask(stream(PLAIN))).problem == problem


@pytest.mark.parametrize(
    ("status", "problem"), [(500, Problem.SERVER_ERROR), (400, Problem.REFUSED)]
)
async def test_a_good_request_must_not_be_refused(
    fake: Fake, driver: Driver, status: int, problem: Problem
) -> None:
    fake.status = status
    outcome = await driver.ask(PLAIN)
    assert (outcome.problem, outcome.reason) == (problem, "E_BAD_PARAM")


@pytest.mark.parametrize(
    ("status", "error", "problem"),
    [
        (400, {}, None),
        (404, {}, Problem.WRONG_ERROR),
        (400, {"reason": "E_CONFLICT"}, Problem.WRONG_ERROR),
        (400, {"param": "steering"}, Problem.WRONG_ERROR),
        (400, {"message": ""}, Problem.WRONG_ERROR),
        (200, {}, Problem.WRONG_ERROR),
        (503, {}, Problem.SERVER_ERROR),
    ],
)
async def test_a_bad_request_must_be_refused_as_it_should(
    fake: Fake, driver: Driver, status: int, error: dict[str, str], problem: Problem | None
) -> None:
    fake.status, fake.error = status, fake.error | error
    outcome = await driver.ask(REFUSED)
    assert outcome.problem is problem and outcome.refused


async def test_answers_of_another_shape_are_a_problem_not_a_crash(driver: Driver) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b'data: {"choices', headers=headers)

    headers = {"content-type": "text/event-stream"}
    async with Driver("http://test", "key", transport=httpx.MockTransport(answer)) as other:
        assert (await other.ask(stream(PLAIN))).problem is Problem.INCOMPLETE
        assert (await other.ask(STEERED)).problem is Problem.INCOMPLETE  # what compile said


async def test_no_connection_is_a_problem(driver: Driver) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    async with Driver("http://test", "key", transport=httpx.MockTransport(answer)) as other:
        outcome = await other.ask(PLAIN)
    assert outcome.problem is Problem.CONNECTION and outcome.status is None


async def test_clients_leave_in_the_middle_or_while_they_wait(fake: Fake, driver: Driver) -> None:
    outcome = await driver.ask(replace(stream(STEERED), leave_lines=1))
    assert outcome.left and outcome.problem is None
    assert not (await driver.ask(replace(stream(STEERED), leave_lines=99))).left
    fake.wait = 5.0
    outcome = await driver.ask(replace(PLAIN, leave_seconds=0.05))
    assert outcome.left and outcome.seconds < 2.0


async def test_keys_go_where_they_belong(fake: Fake, driver: Driver) -> None:
    await driver.ask(PLAIN)
    await driver.ask(replace(PLAIN, admin=True))
    headers = [each["headers"] for each in fake.seen]
    assert [each.get("x-steering-api-key") for each in headers] == [None, "key"]
    assert {each["authorization"] for each in headers} == {"Bearer a"}


async def test_never_more_at_once_than_asked_for(
    fake: Fake, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.wait = 0.01
    numbers: list[int] = []

    def script(place: Place, seed: int, number: int) -> list[list[Ask]]:
        numbers.append(number)
        return [[PLAIN] * 3, [STEERED]]

    monkeypatch.setattr(soak_load, "script", script)
    place = Place("m", ModelGeometry(4, 4, 2, 16, 64), 64, frozenset())
    await driver.run(place, 0, 0.3, 4)
    assert fake.most == 4
    assert sorted(numbers) == list(range(len(numbers)))  # each script once
    assert len(driver.outcomes) == 4 * len(numbers)  # those that began came to their end
    assert driver.problems == 0


async def test_a_server_that_is_gone_ends_the_soak(
    fake: Fake, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.status = 500
    monkeypatch.setattr(soak_load, "script", lambda *_: [[PLAIN]])
    place = Place("m", ModelGeometry(4, 4, 2, 16, 64), 64, frozenset())
    await asyncio.wait_for(driver.run(place, 0, 600.0, 4), 30)
    assert soak_load.MAX_PROBLEMS <= driver.problems < soak_load.MAX_PROBLEMS + 4


async def test_samples_are_kept_up_to_a_limit(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_load, "MAX_SAMPLES", 5)
    for index in range(20):
        await driver.ask(Ask("s", CHAT, {"messages": [], "seed": index}, sampled=True))
    seeds = [sample.body["seed"] for sample in driver.samples]
    assert len(set(seeds)) == 5 and max(seeds) > 5
    assert all(sample.answer["choices"] for sample in driver.samples)


def test_the_events_of_a_response_are_understood() -> None:
    def event(kind: str, **fields: Any) -> str:
        return f"data: {json.dumps({'type': kind, **fields})}"

    ask = Ask("r", RESPONSES, {"stream": True}, steered=True)
    headers = {FINGERPRINT_HEADER: FINGERPRINT}
    done = event("response.completed", response={"steering": STEERING})
    whole = Answer.of_stream(200, headers, [event("response.created"), done])
    assert judge(ask, whole, COMPILED) is None
    part = Answer.of_stream(200, headers, [event("response.created")])
    assert judge(ask, part, COMPILED)[0] is Problem.INCOMPLETE  # type: ignore[index]
    failed = event("error", code="E_STEERING_FAILED", error={"code": 500, "message": "x"})
    failure = Answer.of_stream(200, headers, [event("response.created"), failed])
    assert judge(ask, failure, COMPILED)[0] is Problem.SERVER_ERROR  # type: ignore[index]
