"""LocoRE: Local Coherence Reinforcement (arXiv 2601.20279).

The paper multiplies the attention of the next query to the last w_s output tokens by 1 + beta, in
all heads, with beta = 0.15 (LLaVA-1.5) or 0.20 (Qwen2-VL); beta = 1 collapses. It gives neither
w_s nor the layers nor whether rows are renormalised, and its code was not released, but for a trace
that points at layers 9 .. 14 of 32. Headway's choices: window 8, those layers scaled to depth, and
renormalised rows, which equals adding log(1 + beta) to the logits.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords, KeyClass, KeyTag
from headway.steering.methods.base import (
    CompiledMethod,
    HeadIndex,
    Method,
    describe_heads,
    scaled_layers,
    select_heads,
)
from headway.steering.program import HeadEdit, QueryScope


class LocoRE(Method):
    """Reinforce attention of output tokens to the output tokens just before them."""

    name: ClassVar[str] = "locore"
    method: Literal["locore"]
    beta: Annotated[float, Field(gt=-1.0, le=10.0)] = 0.15
    window: Annotated[int, Field(ge=1, le=4096, description="in tokens")] = 8
    layers: Literal["default"] | list[int] = "default"
    heads: Literal["all"] | list[HeadIndex] = "all"
    renormalize: bool = True
    history: Literal["output", "any"] = "output"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """Queries at positions >= prompt length; class B: keys with 1 <= query - key <= window.

        Renormalised: bias_B = log(1 + beta); otherwise gain_B = 1 + beta.
        """
        default = scaled_layers(9, 14, geometry)
        heads = select_heads(self.heads, self.layers, default, geometry, param)
        nearby = KeyTag.OUTPUT if self.history == "output" else KeyTag(0)
        if self.renormalize:
            fields = {HeadField.BIAS_B: math.log1p(self.beta)}
        else:
            fields = {HeadField.GAIN_B: 1.0 + self.beta}
        words = HeadWords.uniform(
            geometry, heads, fields, class_b=KeyClass(require=nearby, window=self.window)
        )
        details = {
            "beta": self.beta,
            "window": self.window,
            "renormalize": self.renormalize,
            "history": self.history,
            **describe_heads(self.heads, heads),
            "scope": str(QueryScope.OUTPUT),
        }
        return CompiledMethod((HeadEdit(words, QueryScope.OUTPUT),), details=details)
