"""Perplexity: which log probabilities are read, and what is made of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from headway.benchmarks.quality.intervals import draws, interval
from headway.benchmarks.quality.neutral_text import PARAGRAPHS
from headway.benchmarks.quality.perplexity import echoed_logprobs, statistic, text_logprobs

pytestmark = pytest.mark.unit


def token(text: str, logprob: float, number: int = 1) -> dict[str, Any]:
    return {str(number): {"logprob": logprob, "decoded_token": text}}


def test_the_first_token_of_an_echo_has_no_probability() -> None:
    choice = {"logprobs": {"token_logprobs": [None, -1.0, -0.5]}}
    assert echoed_logprobs(choice) == [-1.0, -0.5]
    for empty in ({}, {"logprobs": None}, {"logprobs": {"token_logprobs": [None]}}):
        with pytest.raises(ValueError, match="no log probabilities"):
            echoed_logprobs(empty)


def test_only_the_tokens_of_the_text_are_read() -> None:
    prompt = [None, token("assistant", -9.0), token("\n", -9.0), token("Two", -1.0)]
    both = token(" words", -2.0) | token(" cats", -0.1, 2)  # the likeliest token comes second
    assert text_logprobs([*prompt, both], "Two words") == [-1.0, -2.0]


@pytest.mark.parametrize(
    "prompt", [None, [], [token("words", -1.0)], [token("Two", -1.0), token(" wards", -1.0)]]
)
def test_a_prompt_that_does_not_end_with_the_text_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="do not end"):
        text_logprobs(prompt, "Two words")


def test_perplexity_is_the_inverse_geometric_mean_of_all_tokens() -> None:
    # 2 tokens of probability 1/2 and 4 of 1/8: exp(-(2 log 1/2 + 4 log 1/8) / 6)
    logprobs = np.array([2 * math.log(1 / 2), 4 * math.log(1 / 8)])
    found = interval(statistic(logprobs, np.array([2.0, 4.0])), draws(2))
    assert found.value == pytest.approx(2 ** (14 / 6))
    assert (found.low, found.high) == pytest.approx((2.0, 8.0))


def test_the_neutral_text_is_plain() -> None:
    assert len(set(PARAGRAPHS)) == len(PARAGRAPHS) == 6
    assert all(text.isascii() and text == " ".join(text.split()) for text in PARAGRAPHS)
