"""Ratios of paired measurements, with intervals, and what may be concluded from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 9999
MIN_RESAMPLED = 6
"""Of fewer values a bootstrap gives no interval: it would be far too narrow."""


class Verdict(StrEnum):
    """Whether a ratio reaches its bar."""

    HOLDS = "holds"
    FAILS = "fails"
    UNKNOWN = "too noisy to tell"


@dataclass(frozen=True)
class Ratio:
    """A mean or median over rounds, mostly of ratios, and its 95 % interval.

    low, high: NaN for a median of fewer than `MIN_RESAMPLED`.
    """

    value: float
    low: float
    high: float
    rounds: int


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """The geometric mean of values[i] / baseline[i] over rounds i, which share whatever disturbed
    round i.

    The interval is Student's t for the mean of the logarithms, very wide for two or three rounds.
    Raises ValueError for fewer than two rounds or unequal numbers of them.
    """
    logs = _logs(values, baseline)
    number = len(logs)
    if np.ptp(logs) == 0.0:  # whose mean, and deviation from it, need not be exact
        middle, half = logs[0], 0.0
    else:
        middle = logs.mean()
        half = stdtrit(number - 1, 0.975) * logs.std(ddof=1) / np.sqrt(number)
    value, low, high = (float(np.exp(each)) for each in (middle, middle - half, middle + half))
    return Ratio(value, low, high, number)


def paired_median(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """`paired_ratio` with the median: for single short times, of which a few are far out.

    The interval is that of `bootstrap_median`.
    """
    found = bootstrap_median(_logs(values, baseline))
    value, low, high = (float(np.exp(each)) for each in (found.value, found.low, found.high))
    return Ratio(value, low, high, found.rounds)


def bootstrap_median(values: Sequence[float] | np.ndarray) -> Ratio:
    """The median of measurements that are no ratios, and a percentile bootstrap over rounds.

    Raises ValueError for fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"need two rounds or more, got {len(values)}")
    array = np.asarray(values, float)
    low = high = float("nan")
    if len(array) >= MIN_RESAMPLED:
        drawn = np.random.default_rng(0).choice(array, (RESAMPLES, len(array)))
        low, high = map(float, np.quantile(np.median(drawn, axis=1), [0.025, 0.975]))
    return Ratio(float(np.median(array)), low, high, len(array))


def _logs(values: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    if len(values) != len(baseline) or len(values) < 2:
        raise ValueError(f"need two rounds or more of both, got {len(values)}, {len(baseline)}")
    return np.log(np.asarray(values, float) / np.asarray(baseline, float))


def verdict(ratio: Ratio, bar: float, at_most: bool = False) -> Verdict:
    """Whether the whole interval lies on one side of the bar, the least that the ratio may be, or
    the most. Without an interval it is not known.
    """
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
