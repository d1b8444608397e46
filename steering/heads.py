"""Head profiles: which attention heads of a model the image moves most.

VHD_{l,h} = ||z - z_text||_2 is how far the image moves the output z of head h of layer l at the
last prompt position, z_text being its output without the image (VHR, arXiv 2412.13949). Averaged
over pictures it gives heads that do not depend on the prompt (`headway calibrate heads`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.profiles import Index, Profile, Size, check_ascending

Head = tuple[Index, Index]
Divergence = Annotated[float, Field(ge=0)]


class HeadProfile(Profile):
    """What `headway calibrate heads` found for one model.

    heads: (layer, head) pairs, ascending, of the layers in `layers`. vhd: mean VHD over the
    images, [num_layers][num_heads], outliers counted as zero. alpha: a scale to begin with; it
    had no part in the choice. questions: what was asked about the images.
    """

    kind: Literal["heads"]
    num_heads: Size
    heads: Annotated[tuple[Head, ...], Field(min_length=1)]
    layers: Annotated[tuple[Index, ...], Field(min_length=1)]
    alpha: Annotated[float, Field(gt=0)]
    num_images: Size
    questions: Annotated[tuple[str, ...], Field(min_length=1)]
    vhd: tuple[tuple[Divergence, ...], ...]

    def check_shapes(self, param: str) -> None:
        """Raise SteeringError(E_BAD_PARAM) where the parts of the profile do not fit together."""

        def refuse(message: str, where: str) -> SteeringError:
            return SteeringError(Reason.BAD_PARAM, message, f"{param}.{where}")

        check_ascending(self.layers, self.num_layers, "layer", f"{param}.layers")
        for index, (layer, head) in enumerate(self.heads):
            if layer not in self.layers:
                raise refuse(f"layer {layer} is none of `layers`", f"heads[{index}][0]")
            if head >= self.num_heads:
                allowed = f"0 .. {self.num_heads - 1}"
                raise refuse(
                    f"head {head} does not exist; allowed: {allowed}", f"heads[{index}][1]"
                )
            if index and (layer, head) <= self.heads[index - 1]:
                raise refuse("the heads must ascend", f"heads[{index}]")
        if len(self.vhd) != self.num_layers:
            message = f"has {len(self.vhd)} rows; the model has {self.num_layers} layers"
            raise refuse(message, "vhd")
        for layer, row in enumerate(self.vhd):
            if len(row) != self.num_heads:
                message = f"has {len(row)} values; the model has {self.num_heads} heads"
                raise refuse(message, f"vhd[{layer}]")
