"""AUC and the threshold baseline against loops over all pairs and all thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.benchmarks.quality.intervals import draws
from headway.benchmarks.quality.separability import (
    Margins,
    auc,
    auc_statistic,
    curve,
    false_yes_at_recall,
    threshold_at_recall,
)

pytestmark = pytest.mark.unit

VALUES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def looped_auc(present: list[float], absent: list[float]) -> float:
    won = sum((p > a) + 0.5 * (p == a) for p in present for a in absent)
    return won / (len(present) * len(absent))


def best_threshold(present: list[float], recall: float) -> float:
    """The highest margin of a present object at which enough of them are said to be there."""
    for margin in sorted(present, reverse=True):
        if sum(each >= margin for each in present) / len(present) >= recall - 1e-9:
            return margin
    raise AssertionError


@given(VALUES, VALUES)
def test_auc_counts_all_pairs(present: list[int], absent: list[int]) -> None:
    found = auc(np.array(present, float), np.array(absent, float))
    assert found == pytest.approx(looped_auc(present, absent))


def test_known_values() -> None:
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([0.0]), np.array([0.0])) == 0.5
    assert auc(np.array([1.0, 3.0]), np.array([2.0])) == 0.5
    assert math.isnan(auc(np.array([]), np.array([1.0])))


def sample() -> tuple[Margins, int]:
    generator = np.random.default_rng(11)
    values = np.round(generator.normal(0, 2, 50) * 8) / 8  # with ties, and exact in binary
    truth = generator.random(50) < 0.5
    picture = generator.integers(0, 8, 50)
    return Margins.of((values + 2 * truth).tolist(), truth.tolist(), picture.tolist()), 8


def repeated(margins: Margins, row: np.ndarray) -> tuple[list[float], list[float]]:
    """The margins of a resample, each as often as its picture was drawn."""
    return (
        [float(m) for m, p in zip(margins.present, margins.present_picture, strict=True)
         for _ in range(int(row[p]))],
        [float(m) for m, p in zip(margins.absent, margins.absent_picture, strict=True)
         for _ in range(int(row[p]))],
    )  # fmt: skip


def test_auc_of_weighted_pictures_is_that_of_repeated_ones() -> None:
    margins, pictures = sample()
    weights = draws(pictures, resamples=25)
    found = auc_statistic(margins, pictures)(weights)
    for row, value in zip(weights, found, strict=True):
        assert value == pytest.approx(looped_auc(*repeated(margins, row)))


def test_no_shift_of_the_margin_changes_the_auc() -> None:
    margins, pictures = sample()
    shifted = Margins(
        margins.present - 3.0, margins.absent - 3.0, margins.present_picture, margins.absent_picture
    )
    weights = draws(pictures, resamples=10)
    before, after = (auc_statistic(each, pictures)(weights) for each in (margins, shifted))
    assert before == pytest.approx(after)


@pytest.mark.parametrize("recall", [0.1, 0.5, 0.75, 1.0])
def test_the_threshold_is_the_highest_that_gives_the_recall(recall: float) -> None:
    margins, _ = sample()
    found = threshold_at_recall(margins, recall)
    assert found.margin == best_threshold(margins.present.tolist(), recall)
    assert found.recall >= recall
    higher = margins.present[margins.present > found.margin]
    assert not len(higher) or np.mean(margins.present >= higher.min()) < recall
    assert found.false_yes == np.mean(margins.absent >= found.margin)


def test_the_baseline_of_weighted_pictures_is_that_of_repeated_ones() -> None:
    margins, pictures = sample()
    weights = draws(pictures, resamples=25)
    wanted = np.linspace(0.3, 1.0, 25)
    found = false_yes_at_recall(margins, lambda weights: wanted)(weights)
    for row, recall, value in zip(weights, wanted, found, strict=True):
        present, absent = repeated(margins, row)
        threshold = best_threshold(present, recall)
        assert value == pytest.approx(sum(each >= threshold for each in absent) / len(absent))


def test_a_shifted_arm_equals_its_own_threshold_baseline() -> None:
    """A method that only subtracts a constant from the margin gains nothing over a threshold."""
    margins, pictures = sample()
    weights = draws(pictures, resamples=30)

    def rate(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
        said = weights[:, picture] * (values > 1.0625)  # the margins are multiples of 1/8
        return said.sum(axis=1) / weights[:, picture].sum(axis=1)

    recall = rate(margins.present, margins.present_picture)
    baseline = false_yes_at_recall(margins, lambda weights: recall)(weights)
    shifted = rate(margins.absent, margins.absent_picture)
    # The baseline takes the highest threshold of equal recall, so it can only say "yes" less.
    assert (baseline <= shifted + 1e-12).all()
    assert np.mean(shifted - baseline) < 0.05


def test_no_recall_needs_no_yes_and_an_undefined_one_gives_nothing() -> None:
    margins, pictures = sample()
    found = false_yes_at_recall(margins, lambda weights: np.array([0.0, np.nan]))
    assert found(np.ones((2, pictures))).tolist() == pytest.approx([0.0, np.nan], nan_ok=True)


def test_the_curve_runs_from_no_yes_to_all_yes() -> None:
    margins, _ = sample()
    points = curve(margins)
    assert (points[-1].recall, points[-1].false_yes) == (1.0, 1.0)
    assert [p.margin for p in points] == sorted((p.margin for p in points), reverse=True)
    area = sum(
        (after.false_yes - before.false_yes) * (after.recall + before.recall) / 2
        for before, after in zip(points, points[1:], strict=False)
    )
    area += points[0].false_yes * points[0].recall / 2
    assert area == pytest.approx(auc(margins.present, margins.absent))
