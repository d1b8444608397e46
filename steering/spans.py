"""Spans of a prompt that a request marks, and the token positions they come to.

A span is named by its text, by characters of a chat message, or by token positions. Tokens are
found in the prompt as the engine gets it, after the chat template and the expansion of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from headway.steering.errors import Reason, SteeringError
from headway.steering.rendered_prompt import Piece, Range, RenderedPrompt, find_messages
from headway.steering.validation import StrictModel, validate

MAX_OCCURRENCES = 4096
"""Most places a span of text may have: looking for them holds up every other request."""


class SpanSelector(StrictModel):
    """One of {"text"}, {"message", "start", "end"} and {"tokens"}; ranges are half-open.

    text: every occurrence, in the chat messages if there are any. message: index of a chat
    message, negative from the last; start, end: characters of its text, negative from its end,
    the whole text by default. tokens: [start, end) of the prompt, negative from its end.
    """

    text: Annotated[str, Field(min_length=1)] | None = None
    message: int | None = None
    start: int | None = None
    end: int | None = None
    tokens: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> SpanSelector:
        forms = [name for name in ("text", "message", "tokens") if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError('give exactly one of "text", "message" and "tokens"')
        if self.message is None and (self.start is not None or self.end is not None):
            raise ValueError('"start" and "end" belong to "message"')
        return self


def parse_span(value: Any, param: str = "span") -> SpanSelector:
    """Validate one selector. Raises SteeringError(E_BAD_PARAM)."""
    return validate(SpanSelector, value, param)


def message_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of each OpenAI chat message; text parts are joined by a line break."""
    return ["\n".join(_parts(message.get("content"))) for message in messages]


def check_spans(
    selectors: Sequence[SpanSelector], messages: Sequence[str] | None, param: str
) -> None:
    """Check what can be checked before the prompt is rendered.

    messages: the text of each chat message, None where the prompt is no chat. Raises
    SteeringError(E_BAD_PARAM) with the JSON path of the culprit under `param`.
    """
    for index, selector in enumerate(selectors):
        where = f"{param}[{index}]"
        if selector.message is not None:
            _characters(selector, messages, where)
        if selector.tokens is not None:
            start, end = selector.tokens
            if start >= end and (start < 0) == (end < 0):
                raise _bad(f"selects no token: {start} .. {end} is empty", f"{where}.tokens")
        text = selector.text
        if text and messages is not None and not any(text in message for message in messages):
            raise _bad(f"no message contains {_short(text)}", f"{where}.text")


def locate(
    selectors: Sequence[SpanSelector],
    messages: Sequence[str] | None,
    prompt: RenderedPrompt,
    param: str,
) -> tuple[Range, ...]:
    """The token positions of the spans: ascending ranges that do not touch.

    A token is in a span if they share a character. Raises SteeringError(E_BAD_PARAM) where a span
    selects no token, or where the chat template changed the text it refers to.
    """
    check_spans(selectors, messages, param)
    places = find_messages(messages or (), prompt)
    offsets = np.asarray(prompt.offsets, np.int64).reshape(-1, 2)
    marked = np.zeros(len(offsets), bool)
    for index, selector in enumerate(selectors):
        where = f"{param}[{index}]"
        if selector.tokens is not None:
            start, stop = _token_range(selector.tokens, len(offsets), where)
            found = np.zeros_like(marked)
            found[start:stop] = True
        else:
            spans = _rendered(selector, messages, places, prompt.text, where)
            found = _overlapping(offsets, spans, len(prompt.text))
        if not found.any():
            raise _bad("selects no token of the prompt", where)
        marked |= found
    return _ranges(marked)


def _rendered(
    selector: SpanSelector,
    messages: Sequence[str] | None,
    places: Sequence[tuple[Piece, ...] | None],
    text: str,
    where: str,
) -> list[Range]:
    """The characters of the rendered prompt that a selector means."""
    if selector.text is None:
        wanted = [_characters(selector, messages, where)]
    else:
        areas = [text] if messages is None else messages
        every = (
            (index, at, at + len(selector.text))
            for index, area in enumerate(areas)
            for at in _occurrences(selector.text, area)
        )
        wanted = list(islice(every, MAX_OCCURRENCES + 1))
        if len(wanted) > MAX_OCCURRENCES:
            message = f"occurs more than {MAX_OCCURRENCES} times; mark it another way"
            raise _bad(message, f"{where}.text")
        if messages is None:
            return [(start, end) for _, start, end in wanted]
    spans = []
    for index, start, end in wanted:
        pieces = places[index]
        if pieces is None:
            message = f"the chat template changed the text of message {index}, or contains it too"
            raise _bad(message, where)
        for piece in pieces:
            low, high = max(start, piece.start), min(end, piece.start + piece.length)
            if low < high:
                spans.append((piece.at + low - piece.start, piece.at + high - piece.start))
    return spans


def _occurrences(text: str, whole: str) -> Iterator[int]:
    at = whole.find(text)
    while at >= 0:
        yield at
        at = whole.find(text, at + 1)


def _overlapping(
    offsets: npt.NDArray[np.int64], spans: Sequence[Range], length: int
) -> npt.NDArray[np.bool_]:
    """Which tokens share a character with a span; one without characters shares none."""
    edges = np.zeros(length + 1, np.int64)
    limits = np.asarray(spans, np.int64).reshape(-1, 2)
    np.add.at(edges, limits[:, 0], 1)
    np.add.at(edges, limits[:, 1], -1)
    marked_before = np.concatenate([[0], np.cumsum(np.cumsum(edges[:-1]) > 0)])
    return marked_before[offsets[:, 1]] > marked_before[offsets[:, 0]]


def _characters(
    selector: SpanSelector, messages: Sequence[str] | None, where: str
) -> tuple[int, int, int]:
    """The message of a selector and its characters, as indices from the start."""
    if messages is None:
        raise _bad("refers to a chat message, and the prompt is no chat", f"{where}.message")
    count = len(messages)
    assert selector.message is not None
    if not -count <= selector.message < count:
        message = f"message {selector.message} does not exist; there are {-count} .. {count - 1}"
        raise _bad(message, f"{where}.message")
    length = len(messages[selector.message])
    start = _index(selector.start, 0, length, f"{where}.start")
    end = _index(selector.end, length, length, f"{where}.end")
    if start >= end:
        raise _bad(f"the range {start} .. {end} is empty", where)
    return selector.message % count, start, end


def _token_range(tokens: Sequence[int], length: int, where: str) -> Range:
    start = _index(tokens[0], 0, length, f"{where}.tokens[0]")
    end = _index(tokens[1], length, length, f"{where}.tokens[1]")
    return start, end


def _index(value: int | None, default: int, length: int, where: str) -> int:
    if value is None:
        return default
    if not -length <= value <= length:
        raise _bad(f"{value} is outside of {-length} .. {length}", where)
    return value + length if value < 0 else value


def _parts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, str):
                yield part
            elif isinstance(part, Mapping):
                text = part.get("text") or part.get("refusal") or part.get("thinking")
                if isinstance(text, str):
                    yield text


def _ranges(marked: npt.NDArray[np.bool_]) -> tuple[Range, ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _bad(message: str, where: str) -> SteeringError:
    return SteeringError(Reason.BAD_PARAM, message, where)
