"""What a request's prompt must hold for its steering, checked before anything is rendered.

The engine's front end checks the rendered prompt once more (`server/engine/prompt.py`), for every
endpoint and offline; here the same mistakes become an answer before a stream has begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headway.steering import Reason, SteeringError, SteeringProgram
from headway.steering.spans import check_spans, message_texts

PROMPT_FIELDS = ("messages", "prompt", "input", "prompt_embeds")
"""Where a body holds its prompt; one without any is a dry run of the steering alone."""

PICTURES = ("image", "video")


def check_prompt(program: SteeringProgram, body: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Check a JSON body against its program; the text of each chat message, None if it is no chat.

    Raises SteeringError: E_NO_IMAGE for a program that needs an image where there is none,
    E_BAD_PARAM for a span that no message holds.
    """
    if not any(body.get(name) is not None for name in PROMPT_FIELDS):
        return None
    if program.image_param and not _has_picture(body.get("messages") or body.get("input")):
        message = "this method steers by the image of the prompt, and the prompt has none"
        raise SteeringError(Reason.NO_IMAGE, message, program.image_param)
    messages = body.get("messages")
    texts = None
    if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
        texts = tuple(message_texts(messages))
    if program.marks:
        check_spans(program.marks, texts, program.marks_param)
        if texts is None:
            _check_texts(program, body)
    return texts


def _check_texts(program: SteeringProgram, body: Mapping[str, Any]) -> None:
    """Every text to mark must occur in each prompt of a body that is no chat, if it has texts."""
    prompts = [body.get(name) for name in ("prompt", "input")]
    texts = [
        text
        for prompt in prompts
        for text in (prompt if isinstance(prompt, list) else [prompt])
        if isinstance(text, str)
    ]
    for index, selector in enumerate(program.marks):
        if selector.text is not None and not all(selector.text in text for text in texts):
            message = f"the prompt does not contain {selector.text[:60]!r}"
            param = f"{program.marks_param}[{index}].text"
            raise SteeringError(Reason.BAD_PARAM, message, param)


def _has_picture(value: Any) -> bool:
    """Whether messages, or the input of a response, contain an image or a video part."""
    if isinstance(value, list):
        return any(_has_picture(each) for each in value)
    if not isinstance(value, dict):
        return False
    kind = str(value.get("type", ""))
    if any(picture in name for name in (kind, *value) for picture in PICTURES):
        return True
    return _has_picture(value.get("content"))
