"""Any scale on any head: the plain form of head reinforcement and suppression."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadWords
from headway.steering.methods.base import CompiledMethod, Method, check_heads
from headway.steering.program import HeadEdit, QueryScope

HeadScaleEntry = Annotated[
    tuple[int, int, Annotated[float, Field(ge=-100.0, le=100.0)]],
    Field(description="[layer, head, scale]"),
]


class HeadScale(Method):
    """Multiply the output of each given head by its own scale, at all positions."""

    name: ClassVar[str] = "head_scale"
    method: Literal["head_scale"]
    scales: list[HeadScaleEntry]

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """scale_h = scale on each given head; query scope: all positions."""
        heads = check_heads(
            [(layer, head) for layer, head, _ in self.scales], geometry, f"{param}.scales"
        )
        details: dict[str, Any] = {
            "layers": sorted({layer for layer, _ in heads}),
            "scales": [list(entry) for entry in sorted(self.scales)],
            "scope": str(QueryScope.ALL),
        }
        words = HeadWords.scaled(geometry, self.scales)
        return CompiledMethod((HeadEdit(words),), details=details)
