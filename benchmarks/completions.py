"""Streams of `/v1/completions`: which tokens came, and how long all after the first took."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from headway.benchmarks.quality.client import TIMEOUT_SECONDS, EndpointError, UnsteeredAnswer

DATA, DONE = "data: ", "[DONE]"


@dataclass(frozen=True)
class Completion:
    """One answer. first_tokens: how many tokens its first chunk had.

    decode_seconds: from that chunk to the end of the stream, so that computing the prompt is not
    in it. steering: the `steering` object, None for an unsteered request.
    """

    token_ids: list[int]
    first_tokens: int
    decode_seconds: float
    steering: dict[str, Any] | None = None


def seconds_per_token(answers: Sequence[Completion]) -> float:
    """Time per output token after the first, the mean over the tokens of requests made together.

    Raises ValueError if there were no such tokens.
    """
    tokens = sum(len(each.token_ids) - each.first_tokens for each in answers)
    if tokens < 1:
        raise ValueError("no request has more tokens than came at first")
    return sum(each.decode_seconds for each in answers) / tokens


def complete(url: str, bodies: Sequence[dict[str, Any]]) -> list[Completion]:
    """The answers to requests that are made at the same time.

    bodies: without the fields of streaming; `max_tokens` are generated, whatever the tokens are.
    Raises EndpointError, also for fewer tokens, and UnsteeredAnswer if one that asked for steering
    does not say that it got it.
    """
    return asyncio.run(_complete(url, bodies))


async def _complete(url: str, bodies: Sequence[dict[str, Any]]) -> list[Completion]:
    # New connections for every call: the server closes those that wait through another measurement.
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits) as http:
        return await asyncio.gather(*(_stream(http, body) for body in bodies))


async def _stream(http: httpx.AsyncClient, body: dict[str, Any]) -> Completion:
    fields = {**body, "stream": True, "return_token_ids": True, "ignore_eos": True}
    events: list[tuple[float, str]] = []
    try:
        async with http.stream("POST", "/v1/completions", json=fields) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise EndpointError(f"HTTP {response.status_code}: {text}")
            # Parsed when all is over, so that it costs nobody time meanwhile.
            async for line in response.aiter_lines():
                if line.startswith(DATA):
                    events.append((time.perf_counter(), line.removeprefix(DATA)))
    except httpx.HTTPError as error:
        raise EndpointError(f"{type(error).__name__}: {error}") from error
    answer = parse(events)
    if len(answer.token_ids) != body["max_tokens"]:
        got, asked = len(answer.token_ids), body["max_tokens"]
        raise EndpointError(f"{got} tokens came, not {asked}")
    if body.get("steering") and answer.steering is None:
        raise UnsteeredAnswer("the answer does not say that it was steered")
    return answer


def parse(events: Sequence[tuple[float, str]]) -> Completion:
    """The answer that server-sent events make up, each with the second it came at.

    Raises EndpointError for an error among them, and if they end too early.
    """
    token_ids: list[int] = []
    began: float | None = None
    first_tokens = 0
    steering = None
    for seconds, data in events:
        if data == DONE:
            if began is None:
                raise EndpointError("the stream ended without a token")
            return Completion(token_ids, first_tokens, seconds - began, steering)
        chunk = json.loads(data)
        if "error" in chunk:
            raise EndpointError(str(chunk["error"]))
        for choice in chunk["choices"]:
            token_ids += choice.get("token_ids") or []
        if began is None and token_ids:
            began, first_tokens = seconds, len(token_ids)
        steering = chunk.get("steering", steering)
    raise EndpointError("the stream broke off")
