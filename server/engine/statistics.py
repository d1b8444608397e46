"""How long steering takes per engine step, as the buckets of a histogram."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

BUCKETS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Upper bounds in seconds."""


class StepSeconds:
    """A histogram of seconds that crosses process boundaries as plain values."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one step."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def as_dict(self) -> dict[str, Any]:
        """The count of each bucket, the last one's has no upper bound, and the sum in seconds."""
        return {"counts": list(self.counts), "sum": self.sum}
