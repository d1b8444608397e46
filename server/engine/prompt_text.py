"""The text of a tokenized prompt, and which characters each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headway.steering import Reason, SteeringError
from headway.steering.spans import RenderedPrompt


def prompt_text(tokenizer: Any, token_ids: Sequence[int]) -> RenderedPrompt:
    """Decode a prompt with the offsets of its tokens.

    tokenizer: a Hugging Face fast tokenizer. Special tokens keep their text; every one of several
    tokens that make up one character stands for it.

    Raises SteeringError(E_UNSUPPORTED) for a tokenizer that cannot tell.
    """
    ids = list(token_ids)
    if not getattr(tokenizer, "is_fast", False):
        message = "spans of text need a Hugging Face fast tokenizer; give token positions instead"
        raise SteeringError(Reason.UNSUPPORTED, message)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(again["input_ids"]) == ids:
        offsets = [(int(start), int(stop)) for start, stop in again["offset_mapping"]]
    else:
        # Several ways of cutting a text into tokens decode alike; the client chose another one.
        text, offsets = stepwise(tokenizer, ids, text)
    special = set(tokenizer.all_special_ids)
    marks = [offsets[index] for index, token in enumerate(ids) if token in special]
    return RenderedPrompt(text, offsets, marks)


def stepwise(tokenizer: Any, ids: Sequence[int], whole: str) -> tuple[str, list[tuple[int, int]]]:
    """Decode token by token; a token that completes no character shares the next ones'.

    whole: the decoded text, which ends with what the last tokens fail to complete.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    text, offsets, waiting = "", [], 0
    for token in ids:
        piece = stream.step(tokenizer.backend_tokenizer, int(token))
        waiting += 1
        if piece is not None:
            offsets += [(len(text), len(text) + len(piece))] * waiting
            text, waiting = text + piece, 0
    rest = whole[len(text) :] if waiting else ""
    return text + rest, offsets + [(len(text), len(text) + len(rest))] * waiting
