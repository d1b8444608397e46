"""POPE: does the model say that an object is there? (Li et al., arXiv 2305.10355)

Yes/no questions, half of them about objects that are in the picture, half about absent ones, which
are drawn at random, or are the most frequent ones ("popular"), or those that most often occur with
what is there ("adversarial"). "yes" is the positive class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from headway.benchmarks.quality.intervals import Statistic, quotient

NEGATION = re.compile(r"\b(no|not)\b", re.IGNORECASE)
YES_OR_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Margin:
    """log P("yes") - log P("no") at the first token of an answer, in nats.

    exact: both words were among the tokens listed. Otherwise the missing one is taken to be as
    likely as the least likely listed token, which it is at most.
    """

    value: float
    exact: bool


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: "no" if its first sentence has the word "no" or "not".

    Everything else is a "yes", also what answers nothing; see `is_clear`. Unlike the released
    script, this ignores case and punctuation at the words.
    """
    return not NEGATION.search(answer.split(".")[0])


def is_clear(answer: str) -> bool:
    """Whether an answer begins with "yes" or "no"."""
    return YES_OR_NO.match(answer) is not None


def yes_margin(top: Iterable[tuple[str, float]]) -> Margin | None:
    """The margin from the most likely first tokens, (text, natural log probability) each.

    Adds up the variants of each word: "Yes", " yes", "YES". None if neither word is listed.
    """
    listed = list(top)
    found = {
        word: [logprob for token, logprob in listed if token.strip().lower() == word]
        for word in ("yes", "no")
    }
    if not found["yes"] and not found["no"]:
        return None
    least = min(logprob for _, logprob in listed)
    yes, no = (_log_sum(found[word]) if found[word] else least for word in ("yes", "no"))
    return Margin(yes - no, bool(found["yes"] and found["no"]))


def counts(
    yes: Sequence[bool], truth: Sequence[bool], picture: Sequence[int], pictures: int
) -> np.ndarray:
    """True positives, false positives, true and false negatives by picture, [pictures, 4].

    yes, truth, picture: of each question, what was said, what is so, the picture's index.
    """
    table = np.zeros((pictures, 4))
    said, so = np.asarray(yes, bool), np.asarray(truth, bool)
    outcome = np.select([said & so, said & ~so, ~said & ~so], [0, 1, 2], 3)
    np.add.at(table, (np.asarray(picture, int), outcome), 1)
    return table


def accuracy(table: np.ndarray) -> np.ndarray:
    """Share of right answers; table: counts [..., 4], as for the functions below."""
    return quotient(table[..., 0] + table[..., 2], table.sum(axis=-1))


def precision(table: np.ndarray) -> np.ndarray:
    """Of the "yes" answers, the share that is right."""
    return quotient(table[..., 0], table[..., 0] + table[..., 1])


def recall(table: np.ndarray) -> np.ndarray:
    """Of the objects that are there, the share that is said to be."""
    return quotient(table[..., 0], table[..., 0] + table[..., 3])


def f1(table: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall."""
    right = 2 * table[..., 0]
    return quotient(right, right + table[..., 1] + table[..., 3])


def yes_ratio(table: np.ndarray) -> np.ndarray:
    """Share of "yes" among all answers."""
    return quotient(table[..., 0] + table[..., 1], table.sum(axis=-1))


def false_yes(table: np.ndarray) -> np.ndarray:
    """Share of "yes" among the questions about absent objects."""
    return quotient(table[..., 1], table[..., 1] + table[..., 2])


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "precision": precision,
    "recall": recall,
    "f1": f1,
    "yes_ratio": yes_ratio,
    "false_yes": false_yes,
}


def statistic(measure: str, table: np.ndarray) -> Statistic:
    """A measure as a function of the weights of the pictures; table: counts [pictures, 4]."""
    return lambda weights: MEASURES[measure](weights @ table)


def _log_sum(logprobs: Sequence[float]) -> float:
    largest = max(logprobs)
    if largest == -math.inf:
        return largest
    return largest + math.log(sum(math.exp(each - largest) for each in logprobs))
