"""What steering does to language that it should leave alone: the perplexity of neutral text.

The text is not generated but given, and the model's probabilities of it are read. Two ways:

- as the assistant's answer to a picture, over chat with `prompt_logprobs`: for every method, also
  those that need an image;
- by itself, over /v1/completions with `echo` and `logprobs`: for methods that go without one.

In both the text is part of the prompt, so that methods which edit output positions only (LocoRE,
SGRS) change nothing: their damage, if any, is not seen here, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headway.benchmarks.quality.intervals import Statistic, quotient


def echoed_logprobs(choice: Mapping[str, Any]) -> list[float]:
    """Log probabilities of the prompt's tokens but the first, from a choice of /v1/completions.

    The request had `echo` and `max_tokens: 0`. Raises ValueError if the choice has none.
    """
    values = (choice.get("logprobs") or {}).get("token_logprobs")
    if not values or len(values) < 2:
        raise ValueError("the answer has no log probabilities of the prompt")
    return [float(value) for value in values[1:]]


def text_logprobs(
    prompt_logprobs: Sequence[Mapping[str, Any] | None] | None, text: str
) -> list[float]:
    """Log probabilities of the tokens of `text`, with which the prompt ends.

    prompt_logprobs: vLLM's, for each token of the prompt a mapping from token ids; the prompt's
    own token comes first. Raises ValueError if the prompt does not end with the text.
    """
    found: list[float] = []
    rest = text
    for token in reversed(prompt_logprobs or ()):
        if not rest:
            break
        own = next(iter(token.values())) if token else {}
        piece = own.get("decoded_token") or ""
        if not piece or not rest.endswith(piece):
            break
        rest = rest.removesuffix(piece)
        found.append(float(own["logprob"]))
    if rest or not found:
        raise ValueError("the log probabilities of the prompt do not end with those of the text")
    return found[::-1]


def statistic(logprobs: np.ndarray, tokens: np.ndarray) -> Statistic:
    """exp(-sum of log probabilities / tokens), both by text [texts], over weights of the texts."""
    return lambda weights: np.exp(-quotient(weights @ logprobs, weights @ tokens))
