"""Ratios of paired measurements, with intervals, and what may be concluded from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

MAX_HALF_WIDTH = 0.02
"""An interval wider than +- this supports no verdict."""
RESAMPLES = 9999


class Verdict(StrEnum):
    """Whether a ratio reaches its bar."""

    HOLDS = "holds"
    FAILS = "fails"
    UNKNOWN = "too noisy to tell"
    WIDE = "no verdict, interval wider than 0.04"


@dataclass(frozen=True)
class Ratio:
    """A mean or median over rounds, mostly of ratios, and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    rounds: int


def paired_ratio(values: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Ratio:
    """The geometric mean of values[i] / baseline[i] over rounds i, which share whatever disturbed
    round i.

    The interval is a percentile bootstrap over rounds. Raises ValueError for fewer than two
    rounds or unequal numbers of them.
    """
    return _paired(values, baseline, seed, np.mean)


def paired_median(values: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Ratio:
    """`paired_ratio` with the median: for single short times, of which a few are far out."""
    return _paired(values, baseline, seed, np.median)


def bootstrap_median(values: Sequence[float], seed: int = 0) -> Ratio:
    """The median of measurements that are no ratios, and its interval as of `paired_median`.

    Raises ValueError for fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"need two rounds or more, got {len(values)}")
    array = np.asarray(values, float)
    drawn = np.median(np.random.default_rng(seed).choice(array, (RESAMPLES, len(array))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Ratio(float(np.median(array)), float(low), float(high), len(array))


def _paired(
    values: Sequence[float], baseline: Sequence[float], seed: int, middle: Callable[..., Any]
) -> Ratio:
    if len(values) != len(baseline) or len(values) < 2:
        raise ValueError(f"need two rounds or more of both, got {len(values)}, {len(baseline)}")
    logs = np.log(np.asarray(values, float) / np.asarray(baseline, float))
    value = float(np.exp(middle(logs)))
    if np.ptp(logs) == 0.0:  # the bootstrap of a constant has no interval
        return Ratio(value, value, value, len(logs))
    drawn = middle(np.random.default_rng(seed).choice(logs, (RESAMPLES, len(logs))), axis=1)
    low, high = np.exp(np.quantile(drawn, [0.025, 0.975]))
    return Ratio(value, float(low), float(high), len(logs))


def verdict(
    ratio: Ratio, bar: float, at_most: bool = False, max_half_width: float = MAX_HALF_WIDTH
) -> Verdict:
    """Whether the whole interval lies on one side of the bar, if it is narrow enough to say.

    bar: the least that the ratio may be, or the most. max_half_width: what is narrow enough;
    infinite where the bar is so far from 1 that the side alone matters.
    """
    if not (ratio.high - ratio.low) / 2 <= max_half_width:  # also true of NaN
        return Verdict.WIDE
    holds, fails = ratio.low >= bar, ratio.high < bar
    if at_most:
        holds, fails = ratio.high <= bar, ratio.low > bar
    if holds:
        return Verdict.HOLDS
    return Verdict.FAILS if fails else Verdict.UNKNOWN


def spread(values: Sequence[float]) -> float:
    """Coefficient of variation: the standard deviation over the mean."""
    array = np.asarray(values, float)
    return float(array.std(ddof=1) / array.mean()) if len(array) > 1 else 0.0
