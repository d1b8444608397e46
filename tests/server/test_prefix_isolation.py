"""Cached keys and values never cross from one program to another."""

from __future__ import annotations

import itertools
from typing import Any
from uuid import uuid4

import pytest

from tests.server.calls import CHAT, COMPLETIONS, LOUD, QUIET, post, text_of
from tests.server.conftest import MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROGRAMS: dict[str, Any] = {
    "unsteered": None,
    "quiet": {"methods": QUIET},
    "loud": {"methods": LOUD},
}
STORY = "The old lighthouse keeper climbed the stairs every evening to light the lamp. " * 8


def fields(name: str) -> dict[str, Any]:
    return {"steering": PROGRAMS[name]} if PROGRAMS[name] else {}


def complete(server: Server, prompt: str, program: str, **more: Any) -> tuple[str, int]:
    """The text of a greedy completion, and how many prompt tokens came from the cache."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 1}
    answer = post(server, COMPLETIONS, {**body, **fields(program), **more})
    details = answer["usage"].get("prompt_tokens_details") or {}
    logprobs = [round(value, 4) for value in answer["choices"][0]["logprobs"]["token_logprobs"]]
    return f"{text_of(answer)} {logprobs[:4]}", details.get("cached_tokens") or 0


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.permutations(PROGRAMS, 2)), ids=lambda name: name
)
def test_another_program_starts_cold(server: Server, first: str, second: str) -> None:
    prompt = f"{uuid4().hex} {STORY}"
    complete(server, prompt, first)
    warm, cached = complete(server, prompt, second)
    assert cached == 0
    # A salt of its own makes a request cold whatever ran before.
    cold, _ = complete(server, prompt, second, cache_salt=uuid4().hex)
    assert warm == cold
    assert warm != complete(server, prompt, first)[0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_program_shares_the_cache(server: Server, program: str) -> None:
    prompt = f"{uuid4().hex} {STORY}"
    cold, before = complete(server, prompt, program)
    warm, cached = complete(server, prompt, program)
    assert before == 0
    assert cached >= 64
    assert warm == cold


def test_the_same_program_in_other_words_shares_the_cache(server: Server) -> None:
    prompt = f"{uuid4().hex} {STORY}"
    scales = [[3, 1, 0.0], [10, 4, 0.0]]
    other = {"steering": {"methods": [{"method": "head_scale", "scales": scales}]}}
    complete(server, prompt, "quiet")
    _, cached = complete(server, prompt, "unsteered", **other)
    assert cached >= 64


def test_the_salt_of_the_caller_still_separates(server: Server) -> None:
    prompt = f"{uuid4().hex} {STORY}"
    complete(server, prompt, "quiet", cache_salt="one")
    assert complete(server, prompt, "quiet", cache_salt="two")[1] == 0
    assert complete(server, prompt, "quiet", cache_salt="one")[1] >= 64


@pytest.mark.parametrize(
    "programs",
    [
        ("quiet", "unsteered", "quiet"),
        ("unsteered", "loud", "loud"),
        ("loud", "quiet", "unsteered"),
        ("quiet", "quiet", "quiet"),
    ],
    ids="-".join,
)
def test_turns_may_change_their_steering(server: Server, programs: tuple[str, ...]) -> None:
    system = f"You are a helpful assistant, number {uuid4().hex}. {STORY}"
    messages: list[dict[str, str]] = [{"role": "system", "content": system}]
    questions = ("What does the keeper do?", "Why?", "What happens next?")
    for question, program in zip(questions, programs, strict=True):
        messages.append({"role": "user", "content": question})
        body = {"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0}
        warm = post(server, CHAT, {**body, **fields(program)})
        cold = post(server, CHAT, {**body, **fields(program), "cache_salt": uuid4().hex})
        assert text_of(warm) == text_of(cold)
        messages.append({"role": "assistant", "content": text_of(warm)})
