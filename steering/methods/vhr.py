"""VHR: Vision-aware Head Reinforcement (arXiv 2412.13949).

The paper scales the output z of chosen attention heads, before the output projection, by
alpha = 2 at every position and every step, without renormalisation; alpha = 4 breaks the text.
Its choice of heads compares the head outputs with and without the image. Here the heads are
given explicitly.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadWords
from headway.steering.methods.base import CompiledMethod, HeadIndex, Method, check_heads
from headway.steering.program import HeadEdit, QueryScope


class VHR(Method):
    """Multiply the output of the given heads by alpha at all positions."""

    name: ClassVar[str] = "vhr"
    method: Literal["vhr"]
    alpha: Annotated[float, Field(ge=0.0, le=10.0)] = 2.0
    heads: Literal["auto"] | list[HeadIndex] = "auto"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """scale_h = alpha on the chosen heads; query scope: all positions."""
        if self.heads == "auto":
            message = (
                "automatic head selection is not available in this version; "
                "give the heads as [[layer, head], ...]"
            )
            raise SteeringError(Reason.UNSUPPORTED, message, f"{param}.heads")
        heads = check_heads(self.heads, geometry, f"{param}.heads")
        words = HeadWords.scaled(geometry, [(layer, head, self.alpha) for layer, head in heads])
        details = {
            "alpha": self.alpha,
            "layers": sorted({layer for layer, _ in heads}),
            "heads": [list(head) for head in heads],
            "scope": str(QueryScope.ALL),
        }
        return CompiledMethod((HeadEdit(words),), details=details)
