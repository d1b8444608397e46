"""Whether what came back for a request of `headway bench soak` is what must come back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from headway.benchmarks.soak_asks import Ask

FINGERPRINT_HEADER = "x-headway-fingerprint"
SERVER_ERROR = 500
DONE_EVENTS = ("response.completed", "response.incomplete")


class Problem(StrEnum):
    """What can be wrong with an answer; every answer has one at most."""

    SERVER_ERROR = "unexpected 5xx"
    CONNECTION = "connection error"
    REFUSED = "a good request was refused"
    WRONG_ERROR = "a bad request was not refused as it should be"
    ECHO = "steered, and the answer does not show it"
    TRACE = "not steered, and the answer shows steering"
    INCOMPLETE = "the answer is not complete"


@dataclass(frozen=True)
class Compiled:
    """What the compile route said of a request before it was sent."""

    fingerprint: str
    methods: tuple[str, ...]


@dataclass
class Answer:
    """What came back. error: the `error` of a body or of a stream.

    steering: the echo; choices: how many answers there are; done: whether the stream has its end.
    """

    status: int
    fingerprint: str | None = None
    steering: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    choices: set[int] = field(default_factory=set)
    done: bool = True
    body: Any = None

    @classmethod
    def of_body(cls, status: int, headers: Mapping[str, str], content: bytes) -> Answer:
        """From a body that came as a whole."""
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        found = cls(status, headers.get(FINGERPRINT_HEADER), body=value)
        if isinstance(value, dict):
            found.steering = value.get("steering")
            error = value.get("error")
            found.error = error if isinstance(error, dict) else None
            answers = value.get("choices") or value.get("output") or ()
            found.choices = set(range(len(answers)))
        return found

    @classmethod
    def of_stream(cls, status: int, headers: Mapping[str, str], lines: Iterable[str]) -> Answer:
        """From the lines of server-sent events, of chunks or of the events of a response."""
        found = cls(status, headers.get(FINGERPRINT_HEADER), done=False)
        for line in lines:
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                found.done = True
                continue
            event = json.loads(data)
            if isinstance(event.get("error"), dict):
                found.error = event["error"]
            found.steering = event.get("steering", found.steering)
            found.choices |= {each["index"] for each in event.get("choices") or ()}
            if event.get("type") in DONE_EVENTS:
                found.done = True
                found.steering = event["response"].get("steering")
                found.choices.add(0)
        return found


def judge(ask: Ask, answer: Answer, compiled: Compiled | None) -> tuple[Problem, str] | None:
    """What is wrong with an answer, None if nothing is.

    compiled: of a request that is to be steered.
    """
    expected, error = ask.expected, answer.error or {}
    found = {name: error.get(name) for name in ("reason", "param", "message")}
    status = answer.status
    if status == httpx.codes.OK and error:  # of a stream that had begun
        code = error.get("code")
        status = code if isinstance(code, int) else SERVER_ERROR
    if status >= SERVER_ERROR:
        return Problem.SERVER_ERROR, f"{status} {found}"
    if status not in expected.statuses:
        what = f"{status} {found}, not {expected.statuses}"
        return (Problem.WRONG_ERROR if expected.is_error else Problem.REFUSED), what
    if expected.is_error:
        return _judge_error(ask, answer, found)
    if not ask.generates:
        return None
    if not answer.done or answer.choices != set(range(_choices(ask))):
        what = f"done: {answer.done}, {len(answer.choices)} of {_choices(ask)} choices"
        return Problem.INCOMPLETE, what
    return _judge_echo(answer, compiled)


def _judge_error(ask: Ask, answer: Answer, found: Mapping[str, Any]) -> tuple[Problem, str] | None:
    wanted = ask.expected
    if wanted.reason is not None and (found["reason"], found["param"]) != (
        wanted.reason,
        wanted.param,
    ):
        return Problem.WRONG_ERROR, f"{found}, not {wanted.reason} at {wanted.param}"
    if not found["message"]:
        return Problem.WRONG_ERROR, f"{answer.status} without a message: {answer.body}"
    return None


def _judge_echo(answer: Answer, compiled: Compiled | None) -> tuple[Problem, str] | None:
    if compiled is None:
        if answer.steering is None and answer.fingerprint is None:
            return None
        return Problem.TRACE, f"{answer.fingerprint} {answer.steering}"
    echo = answer.steering or {}
    shown = echo.get("fingerprint"), answer.fingerprint
    if shown != (compiled.fingerprint, compiled.fingerprint):
        return Problem.ECHO, f"body and header show {shown}, not {compiled.fingerprint}"
    methods = tuple(method["method"] for method in echo.get("methods", ()))
    if methods != compiled.methods:
        return Problem.ECHO, f"shows the methods {methods}, not {compiled.methods}"
    return None


def _choices(ask: Ask) -> int:
    asked: int = ask.body.get("n") or 1
    return asked
