"""Head ablation: take a head out of the computation.

"Masking a head" means three different things in the literature: an output of zero, uniform
attention, and attention to itself (identity). They are named apart as `mode`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords
from headway.steering.methods.base import CompiledMethod, HeadIndex, Method, check_heads
from headway.steering.program import HeadEdit, QueryScope


class HeadAblation(Method):
    """Ablate the given heads at all positions.

    zero: the head's output is 0. uniform: it attends to all visible keys alike, as in masking for
    retrieval heads. identity: it attends to its own position, mixed in by u (arXiv 2506.10978).
    """

    name: ClassVar[str] = "head_ablation"
    method: Literal["head_ablation"]
    heads: list[HeadIndex]
    mode: Literal["zero", "uniform", "identity"] = "zero"
    u: Annotated[float, Field(ge=0.0, le=1.0, description='only with mode "identity"')] = 1.0

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """scale_h = 0, gamma = 0, or identity mix u; query scope: all positions."""
        if "u" in self.model_fields_set and self.mode != "identity":
            message = f'u belongs to mode "identity", not to mode "{self.mode}"'
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}.u")
        heads = check_heads(self.heads, geometry, f"{param}.heads")
        edits = {
            "zero": (HeadField.SCALE, 0.0),
            "uniform": (HeadField.GAMMA, 0.0),
            "identity": (HeadField.IDENTITY_MIX, self.u),
        }
        words = HeadWords.uniform(geometry, heads, dict([edits[self.mode]]))
        details = {
            "mode": self.mode,
            **({"u": self.u} if self.mode == "identity" else {}),
            "layers": sorted({layer for layer, _ in heads}),
            "heads": [list(head) for head in heads],
            "scope": str(QueryScope.ALL),
        }
        return CompiledMethod((HeadEdit(words),), details=details)
