"""CAA: Contrastive Activation Addition (arXiv 2312.06681), and its opposite, ablating a direction.

The mean difference v of the residual stream between two kinds of text is added at a layer,

    add      h += strength * v

and the same direction can be taken out of the stream instead, as in directional ablation
(arXiv 2406.11717):

    remove   h -= strength * (h . v) / (v . v) * v

where strength 1 leaves nothing of it. The paper adds at all positions after the prompt; so does the
default here, from the last prompt token on, the first whose successor is sampled.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from headway.steering.geometry import ModelGeometry
from headway.steering.methods.base import (
    CompiledMethod,
    Method,
)
from headway.steering.program import QueryScope, ResidualForm
from headway.steering.residual import Positions, Strength, residual_method


class CAA(Method):
    """Add a fixed direction to the residual stream, or remove it."""

    name: ClassVar[str] = "caa"
    method: Literal["caa"]
    profile: str
    strength: Strength = "profile"
    layers: Literal["profile"] | list[int] = "profile"
    mode: Literal["add", "remove"] = "add"
    scope: Positions = "from_last_prompt_token"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """A residual edit in the form of `mode` at each of the layers; query scope: `scope`."""
        found = residual_method(self, "caa", geometry, param, ResidualForm(self.mode))
        return found.compiled(QueryScope(self.scope), mode=self.mode)
