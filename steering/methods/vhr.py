"""VHR: Vision-aware Head Reinforcement (arXiv 2412.13949).

The paper scales the output z of chosen attention heads, before the output projection, by
alpha = 2 at every position and every step, without renormalisation; alpha = 4 breaks the text.
It chooses the heads by the prompt, layer by layer, those below being scaled already:

    VHD_{l,h} = || z_{l,h}(image and text) - z_{l,h}(text only) ||_2   at the last prompt position,
    0 where VHD and the activity on text alone, TA = || z_{l,h}(text only) ||_2^2, both exceed
    mean + std over the heads of the layer;  chosen are the heads above the median VHD.

"Text only" is the same prompt without its image tokens. The paper does not say whether the heads
of that pass are scaled too; here they are not, unless `reinforce_baseline` asks for it. Nor does it
say which standard deviation (here the unbiased one). With explicit `heads`, or those of a `profile`
that `headway calibrate heads` wrote, nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadWords
from headway.steering.heads import HeadProfile
from headway.steering.methods.base import (
    CompiledMethod,
    HeadIndex,
    Method,
    check_heads,
    check_layers,
    find_profile,
    require_images,
    scaled_layers,
)
from headway.steering.program import HeadEdit, HeadSelection, QueryScope


class VHR(Method):
    """Multiply the output of heads by alpha at all positions."""

    name: ClassVar[str] = "vhr"
    method: Literal["vhr"]
    alpha: Annotated[float, Field(ge=0.0, le=10.0)] = 2.0
    heads: Literal["auto"] | list[HeadIndex] = "auto"
    layers: Literal["default"] | list[int] = "default"
    reinforce_baseline: bool = False
    profile: str | None = None

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """scale_h = alpha on the chosen heads; query scope: all positions."""
        if self.profile is not None:
            if "heads" in self.model_fields_set:
                message = "the profile names the heads; leave `heads` out"
                raise SteeringError(Reason.BAD_PARAM, message, f"{param}.heads")
            named, found = find_profile(
                self.profile, "heads", HeadProfile, geometry, f"{param}.profile"
            )
            return self._explicit(found.heads, geometry, param, named)
        if self.heads != "auto":
            return self._explicit(self.heads, geometry, param)
        require_images(geometry, param)
        if isinstance(self.layers, str):
            layers = default_layers(geometry)
        else:
            layers = check_layers(self.layers, geometry, f"{param}.layers")
        selection = HeadSelection(tuple(layers), self.alpha, self.reinforce_baseline)
        details = {
            "alpha": self.alpha,
            "layers": layers,
            "heads": "auto",
            "reinforce_baseline": self.reinforce_baseline,
            "scope": str(QueryScope.ALL),
        }
        return CompiledMethod(
            (HeadEdit(HeadWords.identity(geometry)),),
            # A factor of 1 changes nothing, whichever heads it is for.
            head_selection=selection if self.alpha != 1.0 else None,
            needs_image=True,
            details=details,
        )

    def _explicit(
        self,
        chosen: Sequence[Sequence[int]],
        geometry: ModelGeometry,
        param: str,
        profile: str | None = None,
    ) -> CompiledMethod:
        for option in ("layers", "reinforce_baseline"):
            if option in self.model_fields_set and getattr(self, option) not in ("default", False):
                message = f"explicit heads leave nothing to choose; leave `{option}` out"
                raise SteeringError(Reason.BAD_PARAM, message, f"{param}.{option}")
        heads = check_heads(chosen, geometry, f"{param}.heads")
        words = HeadWords.scaled(geometry, [(layer, head, self.alpha) for layer, head in heads])
        details = {
            **({} if profile is None else {"profile": profile}),
            "alpha": self.alpha,
            "layers": sorted({layer for layer, _ in heads}),
            "heads": [list(head) for head in heads],
            "scope": str(QueryScope.ALL),
        }
        return CompiledMethod((HeadEdit(words),), details=details)


def default_layers(geometry: ModelGeometry) -> list[int]:
    """Index 1 and the last 14 of 32 layers, at the same relative depth: as for LLaVA-1.5."""
    last = range(scaled_layers(18, 31, geometry).start, geometry.num_layers)
    return sorted({*scaled_layers(1, 1, geometry), *last})
