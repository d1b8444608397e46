"""Head ablation: take a head out of the computation.

"Masking a head" means three different things in the literature: an output of zero, uniform
attention, and attention to itself (identity). They are named apart as `mode`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadWords
from headway.steering.methods.base import CompiledMethod, HeadIndex, Method, check_heads
from headway.steering.program import HeadEdit, QueryScope


class HeadAblation(Method):
    """Ablate the given heads at all positions."""

    name: ClassVar[str] = "head_ablation"
    method: Literal["head_ablation"]
    heads: list[HeadIndex]
    mode: Literal["zero", "uniform", "identity"] = "zero"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """scale_h = 0 on the given heads (mode "zero"); query scope: all positions."""
        if self.mode != "zero":
            message = f'mode "{self.mode}" is not available in this version; use "zero"'
            raise SteeringError(Reason.UNSUPPORTED, message, f"{param}.mode")
        heads = check_heads(self.heads, geometry, f"{param}.heads")
        words = HeadWords.scaled(geometry, [(layer, head, 0.0) for layer, head in heads])
        details = {
            "mode": self.mode,
            "layers": sorted({layer for layer, _ in heads}),
            "heads": [list(head) for head in heads],
            "scope": str(QueryScope.ALL),
        }
        return CompiledMethod((HeadEdit(words),), details)
