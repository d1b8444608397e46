"""Emphasis: steer attention towards marked spans of the prompt (PASTA, arXiv 2311.02262).

In the chosen heads the attention to every prompt token outside of the marked spans is multiplied by
alpha and the row renormalised, which equals adding log(alpha) to their logits. The paper uses
alpha = 0.01 and chooses heads by profiling; here they are given, all by default.
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
    select_heads,
)
from headway.steering.program import HeadEdit, QueryScope
from headway.steering.spans import SpanSelector


class Emphasis(Method):
    """Turn attention from the rest of the prompt to the marked spans, at all positions."""

    name: ClassVar[str] = "emphasis"
    method: Literal["emphasis"]
    spans: Annotated[list[SpanSelector], Field(min_length=1, max_length=64)]
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    heads: Literal["all"] | list[HeadIndex] = "all"
    layers: Literal["all"] | list[int] = "all"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """Class A: prompt keys that are not EMPHASISED; bias_A = log(alpha)."""
        every = range(geometry.num_layers)
        heads = select_heads(self.heads, self.layers, every, geometry, param)
        rest = KeyClass(exclude=KeyTag.EMPHASISED | KeyTag.OUTPUT)
        fields = {HeadField.BIAS_A: math.log(self.alpha)}
        words = HeadWords.uniform(geometry, heads, fields, class_a=rest)
        details = {
            "alpha": self.alpha,
            "spans": [span.model_dump(exclude_none=True) for span in self.spans],
            **describe_heads(self.heads, heads),
            "scope": str(QueryScope.ALL),
        }
        return CompiledMethod((HeadEdit(words),), marks=tuple(self.spans), details=details)
