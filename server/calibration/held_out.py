"""Prompts held out to judge what was fitted on the others, and how sure the verdicts are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""Two-sided 95 % point of the standard normal distribution."""

LEAST_PER_CLUSTER = 2
"""Fewest training prompts a cluster, on average, for which anything is clustered."""

RESAMPLES = 4999
DIGITS = 6


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def rounded(self) -> dict[str, float]:
        """Plain values for a report."""
        return {name: round(value, DIGITS) for name, value in vars(self).items()}


def fold_numbers(
    prompts: Sequence[str], topics: Sequence[str], num_folds: int, seed: int
) -> np.ndarray:
    """In which fold each prompt is held out: int64 [num_prompts], 0 .. num_folds - 1.

    Equal prompts are held out together. In random order, topic by topic, the prompts are dealt to
    the folds like cards, so that folds differ by one prompt at most and so do the shares of a
    topic. Raises ValueError for fewer different prompts than folds.
    """
    first = {
        prompt: topic for prompt, topic in zip(reversed(prompts), reversed(topics), strict=True)
    }
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < num_folds:
        raise ValueError(f"{len(distinct)} different prompts are too few for {num_folds} folds")
    shuffled = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    shuffled.sort(key=lambda prompt: first[prompt])
    fold = {prompt: rank % num_folds for rank, prompt in enumerate(shuffled)}
    return np.array([fold[prompt] for prompt in prompts])


def check_clusters(folds: np.ndarray, num_clusters: int) -> None:
    """Raise ValueError where the folds leave too few prompts to cluster."""
    least = len(folds) - int(np.bincount(folds).max())
    if least < LEAST_PER_CLUSTER * num_clusters:
        raise ValueError(
            f"{num_clusters} clusters of {least} prompts (the others are held out); at least "
            f"{LEAST_PER_CLUSTER} prompts a cluster are needed"
        )


def wilson(hits: np.ndarray) -> Interval:
    """The share of True in bool [n], with Wilson's score interval (Wilson 1927).

    Exact about its centre where bootstrap intervals collapse: at shares of 0 and 1.
    """
    n, share = len(hits), float(np.mean(hits))
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: np.ndarray, seed: int) -> Interval:
    """The mean of a value per prompt, [n], with its percentile bootstrap interval over prompts."""
    generator = np.random.default_rng(seed)
    n = len(values)
    weights = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    low, high = np.quantile(weights @ values, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))
