"""Seam: what a prompt holds, read from the request that vLLM made of it.

vLLM symbols relied on: `EngineCoreRequest.prompt_token_ids`, `prompt_embeds`, `resumable` and
`mm_features`, whose items have `modality` and `mm_position` (`offset`, `length`, `is_embed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headway.server.engine.request import SteeringRequest
from headway.steering import Reason, SteeringError
from headway.steering.positions import PromptFacts, Range
from headway.steering.spans import RenderedPrompt, locate

IMAGES = ("image", "video")
"""Modalities whose tokens carry the tag IMAGE."""

PromptText = Callable[[], RenderedPrompt]
"""Makes the text of a prompt where it is needed."""


def prompt_facts(request: Any, steering: SteeringRequest, text: PromptText) -> PromptFacts:
    """What steering must know of the prompt of an `EngineCoreRequest`.

    Raises SteeringError: E_NO_IMAGE where the program needs an image and there is none,
    E_BAD_PARAM where an emphasised span is not found, E_UNSUPPORTED for prompts that have no
    tokens to mark.
    """
    program = steering.program
    features = [each for each in request.mm_features or () if each.modality in IMAGES]
    places = [each.mm_position for each in features]
    if program.image_param and not places:
        message = "this method steers by the image of the prompt, and the prompt has none"
        raise SteeringError(Reason.NO_IMAGE, message, program.image_param)
    marks: tuple[Range, ...] = ()
    if program.marks:
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            message = "a prompt of embeddings has no text to emphasise"
            raise SteeringError(Reason.UNSUPPORTED, message, program.marks_param)
        marks = locate(program.marks, steering.messages, text(), program.marks_param)
    tokens, embeds = request.prompt_token_ids, request.prompt_embeds
    return PromptFacts(
        len(tokens) if tokens is not None else len(embeds),
        tuple((place.offset, place.offset + place.length) for place in places),
        tuple(part for place in places for part in image_tokens(place)),
        marks,
    )


def image_tokens(place: Any) -> Iterator[Range]:
    """The positions of a `PlaceholderRange` that hold image embeddings, as ranges."""
    flags = [True] * place.length if place.is_embed is None else place.is_embed.tolist()
    start = None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            yield place.offset + start, place.offset + index
            start = None
