"""Spans of a prompt that a request marks, and the token positions they come to.

A span is named by its text, by characters of a chat message, or by token positions. Tokens are
found in the prompt as the engine gets it, after the chat template and the expansion of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from headway.steering.errors import Reason, SteeringError
from headway.steering.validation import StrictModel, validate

Range = tuple[int, int]


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


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text: offsets[i] are the characters of token i, specials those of special tokens
    such as the marks between chat messages.
    """

    text: str
    offsets: Sequence[Range]
    specials: Sequence[Range] = ()


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
    marked: set[int] = set()
    for index, selector in enumerate(selectors):
        where = f"{param}[{index}]"
        if selector.tokens is not None:
            found = set(range(*_token_range(selector.tokens, len(prompt.offsets), where)))
        else:
            spans = list(_spans(selector, messages, prompt, where))
            found = {
                token
                for token, (start, stop) in enumerate(prompt.offsets)
                if any(start < high and stop > low for low, high in spans)
            }
        if not found:
            raise _bad("selects no token of the prompt", where)
        marked |= found
    return _ranges(marked)


def _spans(
    selector: SpanSelector, messages: Sequence[str] | None, prompt: RenderedPrompt, where: str
) -> Iterator[Range]:
    """The characters of the rendered prompt that a selector means."""
    if selector.text is not None:
        areas = [(0, len(prompt.text))]
        if messages is not None:
            pieces = [_find(index, messages, prompt, where) for index in range(len(messages))]
            areas = [(at, at + length) for piece in pieces for _, at, length in piece]
        for low, high in areas:
            at = prompt.text.find(selector.text, low, high)
            while at >= 0:
                yield at, at + len(selector.text)
                at = prompt.text.find(selector.text, at + 1, high)
        return
    index, start, end = _characters(selector, messages, where)
    assert messages is not None
    for offset, at, length in _find(index, messages, prompt, where):
        low, high = max(start, offset), min(end, offset + length)
        if low < high:
            yield at + low - offset, at + high - offset


def _find(
    index: int, messages: Sequence[str], prompt: RenderedPrompt, where: str
) -> list[tuple[int, int, int]]:
    """Where a message stands in the rendered prompt: (offset in it, offset there, length).

    Messages are looked for from the last to the first, because templates like to put text of their
    own in front; first where a special token follows, as it does after a message, and then
    anywhere. A template may strip white space, or handle the parts of a message one by one.
    """
    limit = len(prompt.text)
    for current in range(len(messages) - 1, index - 1, -1):
        text = messages[current]
        pieces = _search(text, prompt, limit)
        if pieces is None and current == index:
            raise _bad(f"the chat template changed the text of message {index}", where)
        if pieces:
            limit = pieces[0][1]
    return pieces or []


def _search(text: str, prompt: RenderedPrompt, limit: int) -> list[tuple[int, int, int]] | None:
    whole = _last(text.strip(), prompt, limit)
    if whole is not None:
        return [(len(text) - len(text.lstrip()), whole, len(text.strip()))] if text.strip() else []
    pieces: list[tuple[int, int, int]] = []
    end = len(text)
    for line in reversed(text.split("\n")):
        start = end - len(line)
        if line.strip():
            at = _last(line.strip(), prompt, limit)
            if at is None:
                return None
            pieces.append((start + len(line) - len(line.lstrip()), at, len(line.strip())))
            limit = at
        end = start - 1
    return pieces[::-1]


def _last(text: str, prompt: RenderedPrompt, limit: int) -> int | None:
    starts = {start for start, _ in prompt.specials}
    at = prompt.text.rfind(text, 0, limit)
    while at >= 0:
        after = at + len(text)
        rest = prompt.text[after:]
        if after + len(rest) - len(rest.lstrip()) in starts:
            return at
        at = prompt.text.rfind(text, 0, at + len(text) - 1) if len(text) else -1
    at = prompt.text.rfind(text, 0, limit)
    return at if at >= 0 else None


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
                text = part.get("text") or part.get("refusal")
                if isinstance(text, str):
                    yield text


def _ranges(positions: set[int]) -> tuple[Range, ...]:
    ranges: list[list[int]] = []
    for position in sorted(positions):
        if ranges and ranges[-1][1] == position:
            ranges[-1][1] += 1
        else:
            ranges.append([position, position + 1])
    return tuple((start, stop) for start, stop in ranges)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _bad(message: str, where: str) -> SteeringError:
    return SteeringError(Reason.BAD_PARAM, message, where)
