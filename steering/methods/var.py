"""VAR: Visual Attention Redistribution (arXiv 2503.03321, ICLR 2025).

A (query, head) pair is image-centric if its attention to the image is at least 0.2 and the share
of it that falls on visual tokens other than sinks is at least rho (0.8 for general tasks, 0.5
against hallucination, 0.9 for vision-centric ones). In those pairs every sink, visual or textual,
keeps 1 - p of its attention, and what is freed goes to the visual tokens that are no sinks, in
proportion to what they have; p = 0.6. Rows keep their sum. Sinks of a layer are the tokens with max
over a few dimensions of |x[d]| / RMS(x) >= tau = 20, x being the residual stream that enters it;
layers 0 and 1 have none, and the last layer is left alone.

The released code differs: its p is the share that is kept, its rho bounds the share of the sinks,
its comparisons are strict, it edits the last layer too, and it does nothing at a layer where no
image token is a sink. `compat: "reference-code"` does as the code does. In both, only prompt tokens
are sinks, and every text token after the image has the edit considered, in prompt and output.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords, KeyClass, KeyTag
from headway.steering.methods.base import (
    CompiledMethod,
    Method,
    describe_heads,
    require_images,
    select_heads,
)
from headway.steering.program import HeadEdit, QueryScope, SinkRule

LEAST = 1e-30
"""The smallest mass that counts as some."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class VAR(Method):
    """Move attention from sinks to the visual tokens that are none, in image-centric heads."""

    name: ClassVar[str] = "var"
    method: Literal["var"]
    p: Share = 0.6
    rho: Share = 0.5
    tau: Annotated[float, Field(gt=0.0, le=1e6)] = 20.0
    min_visual_mass: Share = 0.2
    sink_dims: Literal["auto"] | Annotated[list[int], Field(min_length=1, max_length=64)] = "auto"
    layers: Literal["default"] | list[int] = "default"
    compat: Literal["reference-code"] | None = None

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """Class A = SINK, class B = IMAGE and not SINK, p of A's mass moved to B on condition."""
        require_images(geometry, param)
        as_code = self.compat is not None
        dims = self._dims(geometry, param)
        every = range(2, geometry.num_layers if as_code else geometry.num_layers - 1)
        heads = select_heads("all", self.layers, every, geometry, param)
        if not heads:
            message = f"a model of {geometry.num_layers} layers has no default layers for VAR"
            raise SteeringError(Reason.LAYER_RANGE, message, f"{param}.layers")
        if as_code:
            fields = {
                HeadField.MOVED_SHARE: 1.0 - self.p,
                HeadField.MIN_IMAGE_MASS: above(self.min_visual_mass),
                HeadField.MIN_SHARE_B: 1.0 - self.rho,
                HeadField.MIN_IMAGE_REST: LEAST,
            }
        else:
            fields = {
                HeadField.MOVED_SHARE: self.p,
                HeadField.MIN_IMAGE_MASS: self.min_visual_mass,
                HeadField.MIN_SHARE_B: self.rho,
            }
        words = HeadWords.uniform(
            geometry,
            heads,
            fields,
            class_a=KeyClass(require=KeyTag.SINK),
            class_b=KeyClass(require=KeyTag.IMAGE, exclude=KeyTag.SINK),
        )
        details = {
            **self.model_dump(include={"p", "rho", "tau", "min_visual_mass", "compat"}),
            "sink_dims": list(dims),
            "layers": describe_heads("all", heads)["layers"],
            "scope": str(QueryScope.AFTER_IMAGE),
        }
        rule = SinkRule(dims, above(self.tau) if as_code else self.tau)
        return CompiledMethod(
            (HeadEdit(words, QueryScope.AFTER_IMAGE),),
            sink_rule=None if words.is_identity else rule,
            needs_image=True,
            details=details,
        )

    def _dims(self, geometry: ModelGeometry, param: str) -> tuple[int, ...]:
        if self.sink_dims == "auto":
            if not geometry.sink_dims:
                message = (
                    "no sink dimensions are known for this model; find them with `headway "
                    "calibrate sinks MODEL` and start the server with the profile, or give them"
                )
                raise SteeringError(Reason.NO_SINK_DIMS, message, f"{param}.sink_dims")
            return geometry.sink_dims
        for index, dim in enumerate(self.sink_dims):
            if not 0 <= dim < geometry.hidden_size:
                allowed = f"0 .. {geometry.hidden_size - 1}"
                message = f"dimension {dim} does not exist; this model has {allowed}"
                where = f"{param}.sink_dims[{index}]"
                raise SteeringError(Reason.BAD_PARAM, message, where)
        return tuple(sorted(set(self.sink_dims)))


def above(value: float) -> float:
    """The next float32: `x >= above(value)` is `x > value` for float32 x."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))
