"""Sends the scripts of `headway bench soak`, a fixed number of requests at a time."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from headway.benchmarks.soak_answers import Answer, Compiled, Problem, judge
from headway.benchmarks.soak_asks import STEERING_ROUTES, Ask, Place
from headway.benchmarks.soak_traffic import script
from headway.server.http.admin import KEY_HEADER

TIMEOUT_SECONDS = 300.0
"""Without a byte from the server; longer is a connection error."""
MAX_PROBLEMS = 100
"""So many, and the soak ends early: what follows would tell nothing new."""
MAX_SAMPLES = 200
SMALL_BUFFER = 4096
"""Bytes that the system of a slow reader takes before the reader does."""
PAUSED_LINES = 40
"""So many lines are read slowly."""
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""No connection is used twice: of one that waits, client and server both tire after 5 seconds, and
a request that is sent at that moment is lost by nobody's fault."""


@dataclass(frozen=True)
class Outcome:
    """How one request ended.

    started: seconds since the soak began; seconds: until the answer was complete; first: until its
    first line, of a stream. left: the client went away. reason: of the error that came, if any.
    """

    kind: str
    started: float
    seconds: float
    status: int | None
    first: float | None = None
    steered: bool = False
    refused: bool = False
    left: bool = False
    reason: str | None = None
    problem: Problem | None = None
    detail: str = ""


@dataclass(frozen=True)
class Sample:
    """An answer that can be compared with stock vLLM's: the body that was sent, and the answer."""

    path: str
    body: Mapping[str, Any]
    answer: Mapping[str, Any]


class Driver:
    """Sends requests and keeps how each ended. Use as a context manager within a running loop.

    headers: of every request, such as an API key; key: the admin key.
    """

    def __init__(
        self,
        url: str,
        key: str,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.samples: list[Sample] = []
        self.started = time.perf_counter()
        self._key = key
        self._seen = 0
        self._keep = random.Random(0)
        common: dict[str, Any] = {
            "base_url": url,
            "headers": dict(headers or {}),
            "timeout": httpx.Timeout(TIMEOUT_SECONDS, connect=30.0),
        }
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)]
        self.http = httpx.AsyncClient(
            transport=transport or httpx.AsyncHTTPTransport(limits=LIMITS), **common
        )
        self._slow = httpx.AsyncClient(
            transport=transport or httpx.AsyncHTTPTransport(limits=LIMITS, socket_options=small),
            **common,
        )

    async def __aenter__(self) -> Driver:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        await self._slow.aclose()

    @property
    def problems(self) -> int:
        """How many requests have one."""
        return sum(outcome.problem is not None for outcome in self.outcomes)

    async def run(self, place: Place, seed: int, seconds: float, concurrency: int) -> None:
        """Send scripts for so long; those that have begun are sent to their end.

        With `MAX_PROBLEMS` it ends early.
        """
        self.started = time.perf_counter()
        numbers = itertools.count()
        at_once = asyncio.Semaphore(concurrency)

        async def one(ask: Ask) -> None:
            async with at_once:
                await self.ask(ask)

        async def work() -> None:
            while time.perf_counter() < self.started + seconds and self.problems < MAX_PROBLEMS:
                for step in script(place, seed, next(numbers)):
                    await asyncio.gather(*map(one, step))

        await asyncio.gather(*(work() for _ in range(concurrency)))

    async def ask(self, ask: Ask) -> Outcome:
        """Send one request, judge its answer and keep the outcome."""
        started = time.perf_counter()
        facts: dict[str, Any] = {"status": None}
        found: tuple[Problem, str] | None
        try:
            compiled = await self._compile(ask) if ask.steered else None
            started = time.perf_counter()
            answer = await self._send(ask, facts)
            if answer is None:
                facts["left"], found = True, None
            else:
                facts["status"] = answer.status
                facts["reason"] = (answer.error or {}).get("reason")
                found = judge(ask, answer, compiled)
                if found is None and ask.sampled:
                    self._sample(Sample(ask.path, ask.body, answer.body))
        except httpx.HTTPError as error:
            found = Problem.CONNECTION, f"{type(error).__name__}: {error}"
        except _NotCompiled as error:
            found = Problem.REFUSED, str(error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found = Problem.INCOMPLETE, f"not as the API has it: {type(error).__name__}: {error}"
        problem, detail = found or (None, "")
        outcome = Outcome(
            ask.kind,
            started - self.started,
            time.perf_counter() - started,
            steered=ask.steered,
            refused=ask.expected.is_error,
            problem=problem,
            detail=detail and f"{ask.verb} {ask.path}: {detail}"[:600],
            **facts,
        )
        self.outcomes.append(outcome)
        return outcome

    async def _compile(self, ask: Ask) -> Compiled:
        response = await self.http.post(f"{STEERING_ROUTES}/compile", json=ask.body)
        if response.status_code != httpx.codes.OK:
            raise _NotCompiled(f"compile: {response.status_code} {response.text[:300]}")
        shown = response.json()
        methods = tuple(method["method"] for method in shown["methods"])
        return Compiled(shown["fingerprint"], methods)

    async def _send(self, ask: Ask, facts: dict[str, Any]) -> Answer | None:
        """The answer, None if the client went away before its end."""
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(ask.leave_seconds), self._open(ask) as response:
                headers, status = response.headers, response.status_code
                if not headers.get("content-type", "").startswith("text/event-stream"):
                    return Answer.of_body(status, headers, await response.aread())
                lines: list[str] = []
                async for line in response.aiter_lines():
                    if not line:
                        continue
                    facts.setdefault("first", time.perf_counter() - sent)
                    lines.append(line)
                    if ask.leave_lines is not None and len(lines) > ask.leave_lines:
                        return None
                    if ask.pause and len(lines) < PAUSED_LINES:
                        await asyncio.sleep(ask.pause)
                return Answer.of_stream(status, headers, lines)
        except TimeoutError:
            return None

    @asynccontextmanager
    async def _open(self, ask: Ask) -> AsyncIterator[httpx.Response]:
        client = self._slow if ask.pause else self.http
        content: dict[str, Any] = {} if ask.body is None else {"json": ask.body}
        headers = {KEY_HEADER: self._key} if ask.admin else {}
        if ask.content is not None:
            content = {"content": ask.content}
            # vLLM refuses a body whose type it cannot tell.
            kind = "application/json" if ask.verb == "POST" else "application/octet-stream"
            headers["Content-Type"] = kind
        async with client.stream(ask.verb, ask.path, headers=headers, **content) as response:
            yield response

    def _sample(self, sample: Sample) -> None:
        """Keep a sample: of more than `MAX_SAMPLES`, each with the same probability."""
        self._seen += 1
        if len(self.samples) < MAX_SAMPLES:
            self.samples.append(sample)
        elif (place := self._keep.randrange(self._seen)) < MAX_SAMPLES:
            self.samples[place] = sample


class _NotCompiled(Exception):
    """The compile route refused a request that must be good."""
