"""Bootstrap over pictures, paired differences, McNemar: against obvious implementations."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from headway.benchmarks.quality.intervals import (
    difference,
    draws,
    interval,
    mcnemar,
    quotient,
    ratio,
)

pytestmark = pytest.mark.unit


def test_every_draw_has_as_many_pictures_as_there_are() -> None:
    weights = draws(7, seed=3)
    assert weights.shape == (4999, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean() == pytest.approx(1.0)
    assert (draws(7, seed=3) == weights).all() and (draws(7, seed=4) != weights).any()
    with pytest.raises(ValueError, match="no pictures"):
        draws(0)


def test_an_interval_equals_that_of_a_bootstrap_written_out() -> None:
    right, asked = np.array([2.0, 0.0, 3.0, 1.0]), np.array([2.0, 1.0, 4.0, 3.0])
    weights = draws(4, seed=1, resamples=501)
    drawn = []
    for row in weights:
        chosen = [picture for picture in range(4) for _ in range(int(row[picture]))]
        drawn.append(sum(right[each] for each in chosen) / sum(asked[each] for each in chosen))
    found = interval(ratio(right, asked), weights)
    assert found.value == pytest.approx(0.6)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])))


def test_a_known_case_of_two_pictures() -> None:
    """Two pictures, all right and all wrong: resamples are 0, 1/2 and 1 with 1/4, 1/2 and 1/4."""
    drawn = ratio(np.array([3.0, 0.0]), np.array([3.0, 3.0]))(draws(2, resamples=20000))
    values, times = np.unique(drawn, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert times / 20000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_questions_of_one_picture_are_not_taken_as_independent() -> None:
    """Ten pictures of ten questions that agree are worth ten answers, not a hundred."""
    right = np.array([10.0] * 5 + [0.0] * 5)
    clustered = interval(ratio(right, np.full(10, 10.0)), draws(10))
    alone = interval(ratio(np.repeat([1.0, 0.0], 50), np.ones(100)), draws(100))
    assert clustered.value == alone.value == 0.5
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)


def test_what_is_undefined_stays_so_and_single_undefined_draws_are_left_out() -> None:
    never = interval(ratio(np.zeros(3), np.zeros(3)), draws(3))
    assert math.isnan(never.value) and math.isnan(never.low)
    sometimes = interval(ratio(np.array([1.0, 0.0]), np.array([1.0, 0.0])), draws(2))
    assert (sometimes.value, sometimes.low, sometimes.high) == (1.0, 1.0, 1.0)
    assert np.isnan(quotient(np.array([1.0]), np.array([0.0]))).all()


def test_a_paired_difference_is_narrower_than_that_of_strangers() -> None:
    asked = np.full(40, 4.0)
    before = np.random.default_rng(0).integers(0, 4, 40).astype(float)
    after = before + 1  # each picture gains a quarter, whatever it had
    found = difference(ratio(after, asked), ratio(before, asked), draws(40))
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.p == pytest.approx(2 / 5000)
    shuffled = difference(ratio(after[::-1].copy(), asked), ratio(before, asked), draws(40))
    assert shuffled.value == pytest.approx(0.25) and shuffled.high - shuffled.low > 0.1


def test_no_difference_has_a_p_of_one() -> None:
    same = ratio(np.array([1.0, 2.0, 0.0]), np.full(3, 2.0))
    found = difference(same, same, draws(3))
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_p_of_a_difference_is_the_share_of_draws_beyond_zero() -> None:
    change = np.array([1.0, 1.0, 1.0, -1.0, 0.0])
    ones, weights = np.ones(5), draws(5, seed=2)
    found = difference(ratio(change, ones), ratio(np.zeros(5), ones), weights)
    below = sum(float(row @ change) <= 0 for row in weights)
    assert found.p == pytest.approx(2 * (1 + below) / 5000)
    assert 0.05 < found.p < 0.6


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (3, 3), (0, 8)])
def test_mcnemar_equals_counting_all_outcomes(gained: int, lost: int) -> None:
    """Under the hypothesis each changed answer is a coin; count the outcomes as uneven or more."""
    changed = gained + lost
    uneven = abs(gained - lost)
    outcomes = [abs(2 * sum(coins) - changed) for coins in product((0, 1), repeat=changed)]
    expected = sum(outcome >= uneven for outcome in outcomes) / len(outcomes)
    first = [False] * gained + [True] * lost + [True, False]
    second = [True] * gained + [False] * lost + [True, False]
    found = mcnemar(first, second)
    assert (found.gained, found.lost) == (gained, lost)
    assert found.p == pytest.approx(expected)


def test_mcnemar_wants_the_same_questions() -> None:
    with pytest.raises(ValueError):
        mcnemar([True], [True, False])
