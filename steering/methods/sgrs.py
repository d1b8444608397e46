"""SGRS: Saliency-Guided Rejection Sampling (arXiv 2601.20279).

A candidate c for the next token is drawn from the renormalised top K probabilities, and taken if
what the layers attend to in the text before speaks for it:

    S_l[j] = sum_h | A[t, j] * dL/dA[t, j] |, L = -log p(c), divided by its L2 norm over all keys;
    S(c) = mean over target layers l and history positions j of S_l[j] >= alpha * mean of S over the
    last W tokens taken.

Otherwise another one is drawn; after R draws the candidate of the highest S among the K is taken.
The paper gives alpha = 0.6; K = 5, R = 3, W = 5 and layers 6, 7, 8 of 32 are from its code only.

That code reads row t + 1, the candidate's own, on which L does not depend: its saliencies are zero
and every candidate is taken. Here t is the position that the candidate is predicted from. It counts
the question as history; here history is the output, or all text after the first image. Headway's
choices: the first output token, which has no history, is taken as drawn, as are end tokens; at
temperature 0 candidates come in the order of their probability instead of being drawn; alpha = 0
would refuse nobody, and gives the unsteered answer.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.methods.base import CompiledMethod, Method, check_layers, require_images
from headway.steering.program import QueryScope, SaliencyRule, SamplingGate
from headway.steering.saliency import default_layers

MAX_TOP_K = 32


class SGRS(Method):
    """Refuse candidates for the next token that the text before does not speak for."""

    name: ClassVar[str] = "sgrs"
    method: Literal["sgrs"]
    alpha: Annotated[float, Field(ge=0.0, le=10.0)] = 0.6
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 5
    max_resample: Annotated[int, Field(ge=1, le=MAX_TOP_K, description="draws per token")] = 3
    window: Annotated[int, Field(ge=1, le=64, description="in tokens")] = 5
    layers: Literal["default"] | list[int] = "default"
    history: Literal["output", "after_image"] = "output"
    norm: Literal["row"] = "row"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """A sampling gate with its saliency; no gate where alpha is 0."""
        # The default of 3 draws is cut to fewer candidates; a number of draws asked for is not.
        if self.max_resample > self.top_k and "max_resample" in self.model_fields_set:
            message = f"{self.max_resample} draws of {self.top_k} candidates (top_k)"
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}.max_resample")
        draws = min(self.max_resample, self.top_k)
        history = QueryScope(self.history)
        if history is QueryScope.AFTER_IMAGE:
            require_images(geometry, f"{param}.history")
        if isinstance(self.layers, str):
            layers = default_layers(geometry)
        else:
            layers = tuple(check_layers(self.layers, geometry, f"{param}.layers"))
        details = {
            "alpha": self.alpha,
            "top_k": self.top_k,
            "max_resample": draws,
            "window": self.window,
            "layers": list(layers),
            "history": self.history,
            "norm": self.norm,
        }
        gate = SamplingGate(self.alpha, self.top_k, draws, self.window)
        return CompiledMethod(
            saliency=SaliencyRule(layers, history),
            sampling_gate=gate if self.alpha > 0.0 else None,
            needs_image=history is QueryScope.AFTER_IMAGE,
            details=details,
        )
