"""Does an arm tell present from absent objects better, or does it merely say "yes" less often?

Any method that shifts the bias towards "no" lowers false "yes" answers, and recall with them. Two
figures tell such a shift from a gain: the area under the ROC curve (AUC) of the yes-margin, which
no shift changes, and the false "yes" rate that a plain threshold on the *unsteered* margin would
have had at the same recall, which costs nothing to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headway.benchmarks.quality.intervals import Statistic, quotient

SLACK = 1e-9


@dataclass(frozen=True)
class Margins:
    """Yes-margins of questions about present and absent objects, and the index of each's picture.

    present, absent: float64 [questions]; present_picture, absent_picture: int64 of the same sizes.
    """

    present: np.ndarray
    absent: np.ndarray
    present_picture: np.ndarray
    absent_picture: np.ndarray

    @classmethod
    def of(cls, margins: Sequence[float], truth: Sequence[bool], picture: Sequence[int]) -> Margins:
        """From one entry per question."""
        values, so = np.asarray(margins, float), np.asarray(truth, bool)
        index = np.asarray(picture, int)
        return cls(values[so], values[~so], index[so], index[~so])


@dataclass(frozen=True)
class Threshold:
    """Say "yes" at margins of at least `margin`: what that does."""

    margin: float
    recall: float
    false_yes: float


def auc(present: np.ndarray, absent: np.ndarray) -> float:
    """P(margin of a present object > of an absent one), ties counted half; NaN if one is empty.

    The rank statistic of Mann and Whitney over both numbers of questions.
    """
    if not len(present) or not len(absent):
        return float("nan")
    _, inverse, size = np.unique(
        np.concatenate([present, absent]), return_inverse=True, return_counts=True
    )
    rank = (np.cumsum(size) - (size - 1) / 2)[inverse]
    n = len(present)
    return float((rank[:n].sum() - n * (n + 1) / 2) / (n * len(absent)))


def auc_statistic(margins: Margins, pictures: int) -> Statistic:
    """`auc` as a function of the weights of the pictures."""
    wins = np.sign(margins.present[:, None] - margins.absent[None, :]) / 2 + 0.5
    table = np.zeros((pictures, pictures))
    np.add.at(table, (margins.present_picture[:, None], margins.absent_picture[None, :]), wins)
    present = np.bincount(margins.present_picture, minlength=pictures)
    absent = np.bincount(margins.absent_picture, minlength=pictures)

    def statistic(weights: np.ndarray) -> np.ndarray:
        won = ((weights @ table) * weights).sum(axis=1)
        return quotient(won, (weights @ present) * (weights @ absent))

    return statistic


def threshold_at_recall(margins: Margins, recall: float) -> Threshold:
    """The highest threshold whose recall is at least `recall`."""
    margin = float(_thresholds(margins, np.ones((1, len(margins.present))), np.array([recall]))[0])
    return Threshold(
        margin,
        float(np.mean(margins.present >= margin)),
        float(np.mean(margins.absent >= margin)) if len(margins.absent) else float("nan"),
    )


def false_yes_at_recall(margins: Margins, recall: Statistic) -> Statistic:
    """The false "yes" rate at the threshold that gives this recall, chosen anew for each draw.

    margins: of the unsteered arm; recall: of the arm to compare with.
    """

    def statistic(weights: np.ndarray) -> np.ndarray:
        chosen = _thresholds(margins, weights[:, margins.present_picture], recall(weights))
        absent = weights[:, margins.absent_picture]
        said = (absent * (margins.absent[None, :] >= chosen[:, None])).sum(axis=1)
        result = quotient(said, absent.sum(axis=1))
        result[np.isnan(chosen)] = np.nan
        return result

    return statistic


def curve(margins: Margins) -> list[Threshold]:
    """Every threshold that makes a difference, from the highest margin down."""
    values = np.unique(np.concatenate([margins.present, margins.absent]))[::-1]
    return [
        Threshold(
            float(value),
            float(np.mean(margins.present >= value)),
            float(np.mean(margins.absent >= value)),
        )
        for value in values
    ]


def _thresholds(margins: Margins, weights: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """For each draw the highest margin of a present object that gives the recall, [draws].

    weights: of the present objects' questions [draws, questions]. Infinite for a recall of zero,
    NaN where there are no questions or the recall is undefined.
    """
    result = np.full(len(weights), np.nan)
    if not len(margins.present):
        return result
    order = np.argsort(-margins.present, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    needed = recall * reached[:, -1]
    known = np.isfinite(needed) & (reached[:, -1] > 0)
    first = (reached >= needed[:, None] - SLACK).argmax(axis=1)
    result[known] = margins.present[order][first[known]]
    result[known & (needed <= SLACK)] = np.inf
    return result
