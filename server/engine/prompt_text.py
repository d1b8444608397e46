"""The text of a tokenized prompt, and which characters each token stands for."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from headway.steering import Reason, SteeringError
from headway.steering.rendered_prompt import Range, RenderedPrompt

MAX_WAITING = 256
"""Most tokens that may go by without completing a character; decoding them takes quadratic time."""


def prompt_text(tokenizer: Any, token_ids: Sequence[int]) -> RenderedPrompt:
    """Decode a prompt with the offsets of its tokens, in time linear in its length.

    tokenizer: a Hugging Face fast tokenizer. Special tokens keep their text; every one of several
    tokens that make up one character stands for it. The offsets ascend and leave no character out.

    Raises SteeringError(E_UNSUPPORTED) for a tokenizer that cannot tell, and for tokens that do
    not come to the same text one by one.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or not hasattr(backend, "id_to_token"):
        message = "spans of text need a Hugging Face fast tokenizer; give token positions instead"
        raise SteeringError(Reason.UNSUPPORTED, message)
    ids = [int(token) for token in token_ids]
    text = backend.decode(ids, skip_special_tokens=False)
    offsets = bytewise(backend, ids, text) or stepwise(backend, ids, text)
    if offsets is None:
        message = "some tokens of this prompt are no text; give token positions instead of spans"
        raise SteeringError(Reason.UNSUPPORTED, message)
    special = special_ids(tokenizer)
    marks = [offsets[index] for index, token in enumerate(ids) if token in special]
    return RenderedPrompt(text, offsets, marks)


def special_ids(tokenizer: Any) -> set[int]:
    """The special tokens, also those that have no role such as end of text (Phi's `<|end|>`)."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {*tokenizer.all_special_ids, *(key for key, token in added.items() if token.special)}


def bytewise(backend: Any, ids: Sequence[int], text: str) -> list[Range] | None:
    """Offsets by the bytes that the tokens of a byte-level vocabulary stand for.

    None where the tokens do not come to `text` in this way: the vocabulary is another one. After
    bytes that complete no character a token stands for their replacement U+FFFD too.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets: list[Range] = []
    pieces: list[str] = []
    start = 0
    for index, token in enumerate(ids):
        data = token_bytes(backend.id_to_token(token) or "")
        piece = decoder.decode(data, index == len(ids) - 1)
        incomplete = bool(decoder.getstate()[0])
        pieces.append(piece)
        offsets.append((start, start + len(piece) + incomplete))
        start += len(piece)
    return offsets if "".join(pieces) == text else None


def stepwise(backend: Any, ids: Sequence[int], text: str) -> list[Range] | None:
    """Offsets by decoding token by token; a token that completes no character shares the next ones.

    None where that does not come to `text`, as for bytes that are no characters.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    offsets: list[Range] = []
    start, waiting = 0, 0
    for token in ids:
        try:
            piece = stream.step(backend, token)
        except Exception:  # its own type; what it decoded before has changed
            return None
        waiting += 1
        if waiting > MAX_WAITING:
            return None
        if piece is not None:
            if not text.startswith(piece, start):
                return None
            offsets += [(start, start + len(piece))] * waiting
            start, waiting = start + len(piece), 0
    if start < len(text) and not waiting:
        return None
    return offsets + [(start, len(text))] * waiting


def token_bytes(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; tokens that were added stand as they are."""
    table = byte_values()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode()


@cache
def byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as GPT-2 assigned them.

    Printable characters of Latin-1 stand for themselves, those from U+0100 on for other bytes.
    """
    printable = set(_printable())
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def _printable() -> Iterator[int]:
    for first, last in (("!", "~"), ("¡", "¬"), ("®", "ÿ")):
        yield from range(ord(first), ord(last) + 1)
