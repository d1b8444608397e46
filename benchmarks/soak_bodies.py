"""Prompts, sampling options and bodies of the requests of `headway bench soak`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from headway.benchmarks.quality.neutral_text import PARAGRAPHS
from headway.benchmarks.soak_asks import CHAT, COMPLETIONS, RESPONSES, Place

SENTENCES = tuple(
    f"{sentence.strip()}."
    for each in PARAGRAPHS
    for sentence in each.split(".")
    if sentence.strip()
)
MIN_TOKENS, MAX_TOKENS = 2, 12
"""Output tokens of most requests, at most. Many short requests find more than a few long ones."""
COMPARED_TOKENS = 12
MOST_SENTENCES = 8
TOP = 5
"""Log probabilities at each token of an answer that is compared."""
SCHEMA = {
    "type": "object",
    "properties": {"place": {"enum": ["library", "river", "town"]}, "open": {"type": "boolean"}},
    "required": ["place", "open"],
    "additionalProperties": False,
}


def hot_prompt(index: int) -> str:
    """A prompt that several scripts have, a little longer than a block of vLLM's prefix cache."""
    turned = [PARAGRAPHS[(index + i) % len(PARAGRAPHS)] for i in range(2)]
    question = "Say in your own words what this text is about, and what it leaves out."
    return f"Text number {index}. {' '.join(turned)} {question}"


def own_prompt(draw: random.Random, name: str, sentences: int | None = None) -> str:
    """A prompt that nobody else has. sentences: how many, drawn where None."""
    number = sentences or draw.choice((1, 1, 2, 3, MOST_SENTENCES))
    chosen = draw.sample(SENTENCES, number)
    return f"This is {name}. {' '.join(chosen)} What comes next?"


def long_prompt(max_model_len: int) -> str:
    """A prompt that does not fit: every word is a token or more."""
    return "word " * (max_model_len + 100)


def body(
    place: Place,
    draw: random.Random,
    path: str,
    prompt: str,
    tokens: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A request for one of the routes. tokens: most of the output, drawn where None."""
    if tokens is None:
        tokens = draw.randint(MIN_TOKENS, MAX_TOKENS)
    common: dict[str, Any] = {"model": place.model}
    if path == CHAT:
        common |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    elif path == COMPLETIONS:
        common |= {"prompt": prompt, "max_tokens": tokens}
    else:
        common |= {"input": prompt, "max_output_tokens": tokens}
    return common | fields


def carried(draw: random.Random, methods: list[dict[str, Any]]) -> dict[str, Any]:
    """Steering as the field of its own or inside `vllm_xargs`, with a full report now and then."""
    report = "full" if draw.random() < 0.15 else "summary"
    steering = {"methods": methods, "report": report}
    if draw.random() < 0.15:
        return {"vllm_xargs": {"steering": json.dumps(steering)}}
    return {"steering": steering}


def sampled_options(draw: random.Random, path: str) -> dict[str, Any]:
    """Greedy or with a seed, with what a comparison needs to know of every token."""
    fields = (_seeded if draw.random() < 0.4 else _greedy)(draw, path)
    fields |= {"tokens": COMPARED_TOKENS, "return_tokens_as_token_ids": True}
    return fields | _logprobs(path, TOP)


def options(draw: random.Random, path: str) -> dict[str, Any]:
    """How to sample and what to return, one of `OPTIONS`; streamed or not."""
    fields = dict(draw.choice(RESPONSE_OPTIONS if path == RESPONSES else OPTIONS)(draw, path))
    if "prompt_logprobs" not in fields and draw.random() < 0.5:
        fields["stream"] = True
        if path != RESPONSES and draw.random() < 0.5:
            fields["stream_options"] = {"include_usage": True}
    return fields


def _logprobs(path: str, top: int) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": top} if path == CHAT else {"logprobs": top}


def _greedy(draw: random.Random, path: str) -> dict[str, Any]:
    return {"temperature": 0.0}


def _seeded(draw: random.Random, path: str) -> dict[str, Any]:
    return {"temperature": 0.9, "top_p": 0.95, "seed": draw.randrange(2**31)}


def _plain(draw: random.Random, path: str) -> dict[str, Any]:
    return {"temperature": draw.uniform(0.3, 1.2)}


def _several(draw: random.Random, path: str) -> dict[str, Any]:
    return {"temperature": 0.8, "n": draw.choice((2, 3))}


def _with_logprobs(draw: random.Random, path: str) -> dict[str, Any]:
    return {"temperature": 0.0, **_logprobs(path, 3)}


def _stop(draw: random.Random, path: str) -> dict[str, Any]:
    return {"temperature": 0.7, "stop": draw.sample([".", ",", "\n", " the"], 2)}


def _choice(draw: random.Random, path: str) -> dict[str, Any]:
    return {"structured_outputs": {"choice": ["yes", "no", "it depends"]}}


def _json(draw: random.Random, path: str) -> dict[str, Any]:
    schema = {"name": "answer", "schema": SCHEMA}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _penalties(draw: random.Random, path: str) -> dict[str, Any]:
    return {"presence_penalty": 0.5, "repetition_penalty": 1.1, "min_tokens": 2, "top_k": 20}


def _prompt_logprobs(draw: random.Random, path: str) -> dict[str, Any]:
    return {"temperature": 0.0, "prompt_logprobs": 1}


Option = Callable[[random.Random, str], dict[str, Any]]

RESPONSE_OPTIONS: tuple[Option, ...] = (_greedy, _plain)
OPTIONS: tuple[Option, ...] = (
    _greedy,
    _seeded,
    _plain,
    _several,
    _with_logprobs,
    _stop,
    _choice,
    _json,
    _penalties,
    _prompt_logprobs,
)
