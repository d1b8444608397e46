"""What the workers tell about a steered request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EngineReport:
    """Counts of one steered HTTP or offline request, over all its sequences (n > 1).

    positions_computed: token positions the model ran for the request (prompt and output, without
        those taken from the prefix cache, with those computed again after preemption).
    positions_edited: of these, how many went through every edited layer with the edit applied.
    """

    sequences: int = 0
    positions_computed: int = 0
    positions_edited: int = 0
    failed_stage: str | None = None
    failure: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every computed position was edited as asked, and there was one."""
        return (
            self.failed_stage is None
            and self.positions_edited > 0
            and self.positions_edited == self.positions_computed
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the RPC to the front end."""
        return asdict(self)

    def merge(self, other: EngineReport) -> EngineReport:
        """The sum over sequences of one request."""
        return EngineReport(
            self.sequences + other.sequences,
            self.positions_computed + other.positions_computed,
            self.positions_edited + other.positions_edited,
            self.failed_stage or other.failed_stage,
            self.failure or other.failure,
        )
