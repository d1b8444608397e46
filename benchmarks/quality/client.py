"""Asks an OpenAI-compatible endpoint, many requests at a time, and believes no steering unproven.

A steered request's answer must carry the `steering` object that says what was applied; without it
the endpoint ignored the field, and `UnsteeredAnswer` is raised. Nothing is tried twice: an answer
that came at the second attempt would hide that the first failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import httpx
from tqdm import tqdm

from headway.benchmarks.quality.perplexity import echoed_logprobs, text_logprobs

TOP_LOGPROBS = 20
"""As many as OpenAI's API allows, and vLLM by default."""
CONCURRENCY = 32
TIMEOUT_SECONDS = 300.0

T = TypeVar("T")
Methods = Sequence[Mapping[str, Any]]
"""The `methods` of a steering spec; empty for an unsteered request."""


class EndpointError(RuntimeError):
    """A request failed; the message is the endpoint's own where it sent one."""


class UnsteeredAnswer(EndpointError):
    """A request asked for steering and its answer does not say that it got it."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    top: the most likely first tokens with their log probabilities, () where none were asked for;
    steering: the answer's `steering` object, None for an unsteered request.
    """

    text: str
    top: tuple[tuple[str, float], ...] = ()
    steering: dict[str, Any] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Scored:
    """Log probabilities of the tokens of a given text, and the `steering` object beside them."""

    logprobs: tuple[float, ...]
    steering: dict[str, Any] | None = None


class Client:
    """A connection to one model of one endpoint; use it as an async context manager.

    url: the endpoint with or without the final /v1.
    """

    def __init__(
        self, url: str, model: str, api_key: str | None = None, concurrency: int = CONCURRENCY
    ) -> None:
        self.model = model
        self._running = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(TIMEOUT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=concurrency),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def ask(
        self,
        prompt: str,
        picture: str | None,
        max_tokens: int,
        methods: Methods = (),
        logprobs: bool = False,
    ) -> Answer:
        """The greedy answer to a chat of one message, the picture (a data URL) before the text.

        Raises EndpointError.
        """
        body: dict[str, Any] = {"messages": [_message(prompt, picture)], "max_tokens": max_tokens}
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        data = await self._post("/v1/chat/completions", body, methods)
        try:
            return _answer(data)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(f"the answer has not the shape of OpenAI's: {error!r}") from None

    async def score_answer(
        self, prompt: str, picture: str, text: str, methods: Methods = ()
    ) -> Scored:
        """Score `text` as the assistant's answer to a picture. Raises EndpointError.

        Relies on vLLM's `prompt_logprobs` and `continue_final_message`.
        """
        messages = [_message(prompt, picture), {"role": "assistant", "content": text}]
        body = {
            "messages": messages,
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "add_generation_prompt": False,
            "continue_final_message": True,
        }
        data = await self._post("/v1/chat/completions", body, methods)
        try:
            found = text_logprobs(data.get("prompt_logprobs"), text)
        except ValueError as error:
            raise EndpointError(str(error)) from None
        return Scored(tuple(found), data.get("steering"))

    async def score_text(self, text: str, methods: Methods = ()) -> Scored:
        """Score `text` by itself, all tokens but the first. Raises EndpointError."""
        body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 0}
        data = await self._post("/v1/completions", body, methods)
        try:
            found = echoed_logprobs(data["choices"][0])
        except (ValueError, KeyError, IndexError) as error:
            raise EndpointError(str(error)) from None
        return Scored(tuple(found), data.get("steering"))

    async def capabilities(self) -> dict[str, Any] | None:
        """What the server can steer; None where it is no Headway server. Raises EndpointError."""
        try:
            response = await self._http.get("/v1/steering/capabilities")
        except httpx.HTTPError as error:
            raise EndpointError(_describe(error)) from None
        if response.status_code == 404:
            return None
        return _content(response)

    async def gather(self, calls: Sequence[Callable[[], Awaitable[T]]], title: str) -> list[T]:
        """Run the calls at the same time, with a progress bar; the first error ends all of them."""
        with tqdm(total=len(calls), desc=title, unit="request", leave=False) as progress:

            async def run(call: Callable[[], Awaitable[T]]) -> T:
                result = await call()
                progress.update()
                return result

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(run(call)) for call in calls]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _post(self, path: str, body: dict[str, Any], methods: Methods) -> dict[str, Any]:
        body = {"model": self.model, "temperature": 0, **body}
        if methods:
            body["steering"] = {"methods": [dict(each) for each in methods]}
        async with self._running:
            try:
                response = await self._http.post(path, json=body)
            except httpx.HTTPError as error:
                raise EndpointError(_describe(error)) from None
        data = _content(response)
        if methods:
            check_echo(data.get("steering"), methods)
        return data


def check_echo(steering: Any, methods: Methods) -> None:
    """Raises UnsteeredAnswer unless `steering` says that these methods were applied."""
    if not isinstance(steering, dict):
        raise UnsteeredAnswer(
            "the answer to a steered request has no `steering` object: the endpoint ignored it"
        )
    asked = sorted(str(each["method"]) for each in methods)
    applied = sorted(str(each.get("method")) for each in steering.get("methods", ()))
    if asked != applied:
        raise UnsteeredAnswer(
            f"asked for {', '.join(asked)}, the answer says {', '.join(applied) or 'nothing'}"
        )


def _message(prompt: str, picture: str | None) -> dict[str, Any]:
    text = {"type": "text", "text": prompt}
    image = {"type": "image_url", "image_url": {"url": picture}}
    return {"role": "user", "content": [image, text] if picture else [text]}


def _answer(data: Mapping[str, Any]) -> Answer:
    choice = data["choices"][0]
    listed = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs", [])
    return Answer(
        choice["message"].get("content") or "",
        tuple((each["token"], float(each["logprob"])) for each in listed),
        data.get("steering"),
        choice.get("finish_reason"),
    )


def _content(response: httpx.Response) -> dict[str, Any]:
    try:
        data = response.json()
    except ValueError:
        data = None
    if response.status_code != 200:
        error = data.get("error") if isinstance(data, dict) else None
        known = error.get("message") if isinstance(error, dict) else None
        raise EndpointError(f"HTTP {response.status_code}: {known or response.text[:500]}")
    if not isinstance(data, dict):
        raise EndpointError("the answer is no JSON object")
    return data


def _describe(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
