"""Pairs to calibrate a direction on: a prompt, a wanted continuation and unwanted ones.

A file of pairs is JSONL, a pair a line, in one of two forms; other keys are ignored:

    {"prompt": "...", "target": "...", "other": "..." or ["...", ...]}
    {"prompt": "...", "continuations": {"C++": "...", "Python": "...", ...}}

Of the second form the label given with `--target` names the wanted continuation, all other labels
the unwanted ones. A key "topic" (a string) is used to spread topics evenly when prompts are held
out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_PAIRS = 8
"""Fewest pairs that anything is calibrated on."""


@dataclass(frozen=True)
class Pair:
    """A prompt with a wanted continuation and at least one unwanted; topic: "" for none."""

    prompt: str
    target: str
    others: tuple[str, ...]
    topic: str = ""


def read_pairs(path: Path, target: str | None = None) -> tuple[Pair, ...]:
    """The pairs in a file; target: the label of the wanted continuations, for the second form.

    Raises OSError if it cannot be read, and ValueError, naming file and line, for what is no pair
    or for fewer than `MIN_PAIRS` of them.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_pair(json.loads(line), target))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if len(pairs) < MIN_PAIRS:
        raise ValueError(f"{path}: holds {len(pairs)} pairs; at least {MIN_PAIRS} are needed")
    return tuple(pairs)


def _pair(value: Any, target: str | None) -> Pair:
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    prompt, topic = _text(value, "prompt"), value.get("topic", "")
    if not isinstance(topic, str):
        raise ValueError('"topic" must be a string')
    if "continuations" in value:
        wanted, others = _labelled(value, target)
    else:
        wanted, others = _plain(value, target)
    if wanted in others:
        raise ValueError("the wanted continuation is also an unwanted one")
    return Pair(prompt, wanted, others, topic)


def _labelled(value: dict[str, Any], target: str | None) -> tuple[str, tuple[str, ...]]:
    for key in ("target", "other"):
        if key in value:
            raise ValueError(f'has both "continuations" and "{key}"')
    texts = value["continuations"]
    if not isinstance(texts, dict) or len(texts) < 2:
        raise ValueError('"continuations" must be an object of at least two labels')
    labels = ", ".join(texts)
    if target is None:
        raise ValueError(f"say with --target which is the wanted continuation: {labels}")
    if target not in texts:
        raise ValueError(f"has no continuation {target!r}; the labels are: {labels}")
    return _text(texts, target), tuple(_text(texts, label) for label in texts if label != target)


def _plain(value: dict[str, Any], target: str | None) -> tuple[str, tuple[str, ...]]:
    if target is not None:
        raise ValueError('--target needs "continuations" to choose from')
    others = value.get("other")
    if not isinstance(others, list):
        return _text(value, "target"), (_text(value, "other"),)
    if not others:
        raise ValueError('"other" holds no text')
    found = tuple(_text({"other": other}, "other") for other in others)
    return _text(value, "target"), found


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{key}" must be a text that is not empty')
    return text
