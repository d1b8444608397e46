"""How sure a figure is: bootstrap intervals over pictures, paired differences, McNemar's test.

Questions about one picture are not independent, so pictures are drawn, with all their questions
(cluster bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, section 3.8).
A statistic is a function of how often each picture was drawn; the same draws serve every arm, so
that a difference of two arms is one of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Weights of the pictures [draws, pictures] -> a value for each draw [draws], NaN if undefined."""

RESAMPLES = 4999
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % percentile bootstrap interval; NaN where nothing is defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference with its interval; p: two-sided, that it is zero, by the same draws."""

    p: float


@dataclass(frozen=True)
class McNemar:
    """Yes/no answers of two arms to the same questions, and the p of the exact test.

    gained: "yes" only in the second arm; lost: only in the first.
    """

    gained: int
    lost: int
    p: float


def draws(pictures: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each picture is in each resample, float64 [resamples, pictures].

    Raises ValueError where there are no pictures.
    """
    if pictures < 1:
        raise ValueError("no pictures to draw from")
    generator = np.random.default_rng(seed)
    return generator.multinomial(pictures, np.full(pictures, 1 / pictures), resamples).astype(float)


def interval(statistic: Statistic, weights: np.ndarray) -> Interval:
    """The statistic of all pictures once, and its interval over `weights` [draws, pictures].

    Draws in which the statistic is undefined are left out.
    """
    value, drawn = _evaluate(statistic, weights)
    return Interval(value, *_bounds(drawn))


def difference(statistic: Statistic, baseline: Statistic, weights: np.ndarray) -> Difference:
    """statistic - baseline, both on the same draws."""

    def both(drawn: np.ndarray) -> np.ndarray:
        return statistic(drawn) - baseline(drawn)

    value, drawn = _evaluate(both, weights)
    finite = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not finite.size:
        return Difference(value, math.nan, math.nan, math.nan)
    least = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    p = min(1.0, 2 * (1 + least) / (1 + finite.size))
    return Difference(value, *_bounds(drawn), p)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    """The statistic sum(numerator) / sum(denominator), given both by picture [pictures]."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        return quotient(weights @ numerator, weights @ denominator)

    return statistic


def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise division, NaN where the denominator is zero."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """The exact test that both arms say "yes" equally often (McNemar 1947, binomial form).

    It takes the questions as independent. Raises ValueError for unequal lengths.
    """
    pairs = list(zip(first, second, strict=True))
    gained = sum(after and not before for before, after in pairs)
    lost = sum(before and not after for before, after in pairs)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return McNemar(gained, lost, min(1.0, 2 * tail / 2**changed))


def _evaluate(statistic: Statistic, weights: np.ndarray) -> tuple[float, np.ndarray]:
    value = statistic(np.ones((1, weights.shape[1])))
    return float(value[0]), statistic(weights)


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    finite = drawn[np.isfinite(drawn)]
    if not finite.size:
        return math.nan, math.nan
    low, high = np.quantile(finite, LEVELS)
    return float(low), float(high)
