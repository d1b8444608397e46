"""Activation steering in the demo: a coding question that names no language, answered towards C++.

The profile is what `headway calibrate gact` made of the coding tasks in `benchmarks/quality/data`
(`server/models/weights/README.md`). The unsteered and the steered request run in one batch.
"""

from __future__ import annotations

import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headway.benchmarks.quality.language import language_of

PROFILE = Path(__file__).parent / "models" / "weights" / "prefer_cpp.safetensors"
NAME = "prefer-cpp"
QUESTION = "Write a function that finds a root of a continuous function by bisection."
STEERING = {"methods": [{"method": "gact", "profile": NAME}]}
FLAGS = ("--steering-profile", f"{NAME}={PROFILE}")
SHOWN_LINES = 9


class VectorDemoError(RuntimeError):
    """The demo did not show what it should."""


def ask(url: str, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The unsteered and the steered answer: text, and the `steering` object beside it.

    Raises VectorDemoError unless the second differs and the server vouches for it.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def complete(steering: dict[str, Any] | None) -> dict[str, Any]:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=100,
            temperature=0,
            extra_body={"steering": steering} if steering else None,
        )
        echo = (answer.model_extra or {}).get("steering")
        return {"text": answer.choices[0].message.content or "", "steering": echo}

    with ThreadPoolExecutor(2) as pool:
        plain, steered = pool.map(complete, (None, STEERING))
    check(plain, steered)
    return plain, steered


def check(plain: dict[str, Any], steered: dict[str, Any]) -> None:
    """Raise VectorDemoError unless the answers show steering, and the server vouches for it."""
    if plain["steering"] is not None:
        raise VectorDemoError("the unsteered answer claims to be steered")
    if not steered["steering"] or not steered["steering"].get("positions_edited"):
        raise VectorDemoError("the steered answer lacks the report of what was edited")
    if plain["text"] == steered["text"]:
        raise VectorDemoError("the steered answer equals the unsteered one")


def show(plain: dict[str, Any], steered: dict[str, Any]) -> None:
    """Print the beginnings of both answers, and what the server reports."""
    [method] = steered["steering"]["methods"]
    print(f"\n{QUESTION}")
    for title, answer in (("unsteered", plain), ("gact", steered)):
        lines = answer["text"].strip().splitlines()[:SHOWN_LINES]
        print(f"\n  {title}, {language_of(answer['text'])}:")
        print(textwrap.indent("\n".join(line[:100] for line in lines), "    "))
    layers = ", ".join(map(str, method["layers"]))
    print(f"\n  profile {method['profile']}, strength {method['strength']:g}, layers {layers}")
