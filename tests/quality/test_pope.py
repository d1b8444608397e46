"""POPE: reading answers, margins, and the measures of a table counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headway.benchmarks.quality import pope
from headway.benchmarks.quality.intervals import draws, interval
from headway.benchmarks.quality.pope import is_clear, says_yes, yes_margin

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes.", True),
        ("No.", False),
        ("no", False),
        ("No, there is no fork in the image.", False),
        ("There is not a fork. Yes, really.", False),
        ("Yes, there is a fork. It is not large.", True),  # the first sentence alone counts
        ("Yes, there is a knife", True),
        ("Nothing, a snowy notebook", True),  # "no" and "not" only as words
        ("", True),
    ],
)
def test_answers_are_read_as_pope_reads_them(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_an_answer_that_answers_nothing_is_not_clear() -> None:
    assert is_clear("Yes.") and is_clear(" no, it") and is_clear('"No"')
    assert not is_clear("There is a fork.") and not is_clear("Nothing") and not is_clear("")


def test_a_margin_adds_up_the_variants_of_each_word() -> None:
    top = [("Yes", math.log(0.4)), (" yes", math.log(0.2)), ("No", math.log(0.3)), ("A", -3.0)]
    margin = yes_margin(top)
    assert margin is not None and margin.exact
    assert margin.value == pytest.approx(math.log(0.6 / 0.3))


def test_a_word_that_is_not_listed_gives_a_bound() -> None:
    margin = yes_margin([("Yes", -0.1), ("The", -3.0), ("A", -5.0)])
    assert margin is not None and not margin.exact
    assert margin.value == pytest.approx(-0.1 + 5.0)
    assert yes_margin([("The", -0.1)]) is None
    assert yes_margin([]) is None


def test_the_measures_of_a_table_counted_by_hand() -> None:
    # 3 true positives, 2 false positives, 4 true negatives, 1 false negative
    yes = [True] * 3 + [True] * 2 + [False] * 4 + [False]
    truth = [True] * 3 + [False] * 2 + [False] * 4 + [True]
    table = pope.counts(yes, truth, [0, 1, 1, 0, 0, 0, 1, 1, 1, 1], 2)
    assert table.tolist() == [[1, 2, 1, 0], [2, 0, 3, 1]]
    total = table.sum(axis=0)
    found = {name: float(measure(total)) for name, measure in pope.MEASURES.items()}
    assert found == pytest.approx(
        {
            "accuracy": 7 / 10,
            "precision": 3 / 5,
            "recall": 3 / 4,
            "f1": 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4),
            "yes_ratio": 5 / 10,
            "false_yes": 2 / 6,
        }
    )


@pytest.mark.parametrize("measure", pope.MEASURES)
def test_a_measure_of_weighted_pictures_is_that_of_repeated_ones(measure: str) -> None:
    generator = np.random.default_rng(5)
    yes, truth = generator.random((2, 60)) < 0.5
    picture = generator.integers(0, 6, 60)
    table = pope.counts(yes.tolist(), truth.tolist(), picture.tolist(), 6)
    weights = draws(6, resamples=20)
    found = pope.statistic(measure, table)(weights)
    for row, value in zip(weights, found, strict=True):
        rows = [q for q in range(60) for _ in range(int(row[picture[q]]))]
        again = pope.counts(yes[rows].tolist(), truth[rows].tolist(), [0] * len(rows), 1)
        assert value == pytest.approx(float(pope.MEASURES[measure](again[0])))


def test_no_yes_at_all_leaves_precision_undefined() -> None:
    table = pope.counts([False, False], [True, False], [0, 0], 1)
    assert math.isnan(interval(pope.statistic("precision", table), draws(1)).value)
    assert interval(pope.statistic("recall", table), draws(1)).value == 0.0
