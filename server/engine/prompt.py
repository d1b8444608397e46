"""Seam: what a prompt holds, read from what vLLM made of it.

vLLM symbols relied on: `EngineCoreRequest.prompt_token_ids`, `prompt_embeds` and `mm_features`,
whose items have `modality` and `mm_position` (`offset`, `length`, `is_embed`); before that,
rendered inputs with `type`, `prompt_token_ids`, `mm_placeholders` and `mm_hashes`
(`vllm.inputs.engine`); `InputProcessor.tokenizer` and `renderer.mm_processor_cache` (`invalidate`);
`CacheConfig.block_size` and `kv_cache_max_concurrency`, which the front end learns from the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headway.server.engine.cache_key import prompt_digest
from headway.server.engine.prompt_text import prompt_text
from headway.server.engine.request import SteeringRequest
from headway.steering import Reason, SteeringError, SteeringProgram
from headway.steering.positions import PromptFacts, Range
from headway.steering.spans import locate

PICTURES = ("image", "video")
"""Modalities that count as images."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine gets it.

    token_ids: None for a prompt of embeddings; places: `PlaceholderRange` of each image or video;
    hashes: of all its multimodal items.
    """

    token_ids: Sequence[int] | None
    length: int
    places: tuple[Any, ...] = ()
    hashes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Tells this prompt from others, images included."""
        return prompt_digest(self.token_ids or (), self.hashes)

    @classmethod
    def of_request(cls, request: Any) -> Prompt:
        """The prompt of an `EngineCoreRequest`."""
        features = request.mm_features or ()
        places = (each.mm_position for each in features if is_image(each.modality))
        embeds, tokens = request.prompt_embeds, request.prompt_token_ids
        length = len(tokens) if tokens is not None else len(embeds)
        hashes = tuple(each.mm_hash for each in features)
        return cls(tokens if embeds is None else None, length, tuple(places), hashes)

    @classmethod
    def of_input(cls, rendered: Any) -> Prompt | None:
        """The prompt of a rendered input of vLLM's front end; None if it has no plain tokens."""
        if not isinstance(rendered, dict) or rendered.get("type") not in ("token", "multimodal"):
            return None
        places = [
            place
            for modality, found in (rendered.get("mm_placeholders") or {}).items()
            if is_image(modality)
            for place in found
        ]
        tokens, hashes = rendered["prompt_token_ids"], rendered.get("mm_hashes") or {}
        return cls(
            tokens,
            len(tokens),
            tuple(sorted(places, key=lambda place: place.offset)),
            tuple(each for found in hashes.values() for each in found),
        )


def is_image(modality: str) -> bool:
    """Whether tokens of a modality carry the tag IMAGE."""
    return modality in PICTURES


def require_image(program: SteeringProgram, has_image: bool) -> None:
    """Raise SteeringError(E_NO_IMAGE) for a program that means nothing without an image."""
    if program.image_param and not has_image:
        message = "this method steers by the image of the prompt, and the prompt has none"
        raise SteeringError(Reason.NO_IMAGE, message, program.image_param)


def read_prompt(prompt: Prompt, steering: SteeringRequest, input_processor: Any) -> PromptFacts:
    """`prompt_facts` on the way into the engine; input_processor: vLLM's.

    vLLM's front end takes it that the engine has seen every image that it processed, and does not
    send it again: where the request is refused its images are forgotten, so that they are.
    """
    try:
        facts = prompt_facts(prompt, steering, input_processor.tokenizer)
        check_selection(steering.program, prompt, facts, input_processor.vllm_config)
        return facts
    except SteeringError:
        cache = input_processor.renderer.mm_processor_cache
        for mm_hash in prompt.hashes if cache is not None else ():
            cache.invalidate(mm_hash)
        raise


def prompt_facts(prompt: Prompt, steering: SteeringRequest, tokenizer: Any) -> PromptFacts:
    """What steering must know of a prompt.

    Raises SteeringError: E_NO_IMAGE where the program needs an image and there is none,
    E_BAD_PARAM where an emphasised span is not found, E_UNSUPPORTED for prompts that have no
    tokens to mark.
    """
    program = steering.program
    require_image(program, bool(prompt.places))
    marks: tuple[Range, ...] = ()
    if program.marks:
        if prompt.token_ids is None:
            message = "a prompt of embeddings has no text to emphasise"
            raise SteeringError(Reason.UNSUPPORTED, message, program.marks_param)
        rendered = prompt_text(tokenizer, prompt.token_ids)
        marks = locate(program.marks, steering.messages, rendered, program.marks_param)
    images = [parts for place in prompt.places if (parts := tuple(image_tokens(place)))]
    return PromptFacts(
        prompt.length,
        # Some models count the tokens around an image as its placeholder: they are text.
        tuple((parts[0][0], parts[-1][1]) for parts in images),
        tuple(part for parts in images for part in parts),
        marks,
    )


def check_selection(
    program: SteeringProgram, prompt: Prompt, facts: PromptFacts, vllm_config: Any
) -> None:
    """Raise SteeringError unless the heads that a program selects can be chosen by this prompt.

    E_PROMPT_TOO_LONG where it does not fit in one engine step, which may have to go on for all
    other requests at the same time, or not into the KV cache together with its text pass.
    """
    selection, param = program.head_selection, program.selection_param
    if selection is None:
        return
    if prompt.token_ids is None:
        message = "heads cannot be chosen by a prompt of embeddings; give them explicitly"
        raise SteeringError(Reason.UNSUPPORTED, message, param)
    text = facts.prompt_len - sum(stop - start for start, stop in facts.image_spans)
    if text < 1:
        message = "heads are chosen by what the images change, and this prompt has no text"
        raise SteeringError(Reason.BAD_PARAM, message, param)
    scheduler = vllm_config.scheduler_config
    needed, what = facts.prompt_len, f"the prompt has {facts.prompt_len} tokens"
    if selection.reinforce_baseline:
        needed, what = needed + text, f"{what} and {text} without its images"
        if scheduler.max_num_seqs < 2:
            message = "reinforce_baseline runs two sequences at once, and max_num_seqs is 1"
            raise SteeringError(Reason.UNSUPPORTED, message, f"{param}.reinforce_baseline")
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    threshold = scheduler.long_prefill_token_threshold
    others = scheduler.max_num_seqs - 1
    limit, because = budget - others, f"its {budget} less one for each of {others} others"
    if 0 < threshold < limit:
        limit, because = threshold, "long_prefill_token_threshold"
    if needed > limit:
        message = (
            f"{what}; to choose heads it must run in one engine step, of at most {limit} tokens "
            f"({because}); give the heads explicitly, or start the engine with a larger "
            "max_num_batched_tokens"
        )
        raise SteeringError(Reason.PROMPT_TOO_LONG, message, param)
    if selection.reinforce_baseline:
        _check_room_for_both(what, (facts.prompt_len, text), vllm_config, param)


def _check_room_for_both(what: str, lengths: Range, vllm_config: Any, param: str) -> None:
    """Raise SteeringError where two prompts of a step never fit into the KV cache together.

    vLLM's front end knows its size as the number of requests of the greatest length.
    """
    cache = vllm_config.cache_config
    if cache.kv_cache_max_concurrency is None:
        return
    longest = math.ceil(vllm_config.model_config.max_model_len / cache.block_size)
    blocks = round(cache.kv_cache_max_concurrency * longest) - 1  # one is never given out
    if blocks_for(lengths, cache.block_size) > blocks:
        message = (
            f"{what}, and the KV cache, of {blocks * cache.block_size} tokens, must hold both at "
            "once; give the heads explicitly, or start the engine with a larger KV cache"
        )
        raise SteeringError(Reason.PROMPT_TOO_LONG, message, param)


def blocks_for(lengths: Iterable[int], block_size: int) -> int:
    """Blocks of the KV cache that must be free before prompts of these lengths are let in."""
    return sum(length // block_size + 1 for length in lengths)


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
