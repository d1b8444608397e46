"""Provisional."""

from __future__ import annotations
from headway.steering.validation import StrictModel, validate


class SpanSelector(StrictModel):
    text: str | None = None
    message: int | None = None
    start: int | None = None
    end: int | None = None
    tokens: list[int] | None = None


def parse_span(value, param="span"):
    return validate(SpanSelector, value, param)


def check_spans(selectors, messages, param): ...
def message_texts(messages):
    return [str(m.get("content")) for m in messages]


def locate(selectors, messages, rendered, offsets, param):
    out = []
    for s in selectors:
        if s.tokens:
            out.append(tuple(s.tokens))
    return sorted(out)
