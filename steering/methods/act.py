"""ACT on heads, in its static form: a fixed vector added to the output of chosen attention heads.

Inference-time intervention (ITI, arXiv 2306.03341) shifts the output z of a head, before the output
projection, along the direction theta of a probe, by a number of standard deviations sigma of the
activations along it:

    z_{l,h} += strength * sigma_{l,h} * theta_{l,h}

ACT (arXiv 2406.00034) makes the amount depend on what the probe reads, alpha * (1 - sigmoid(theta .
z) + beta), and adds the directions of all clusters at once. That is not done here: the shift of a
head is the same at all positions of the scope, which is what an affine edit of the head's output
can express. Profiles hold sigma * theta (`headway calibrate act`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords, index_shifts
from headway.steering.methods.base import (
    CompiledMethod,
    Method,
    check_layers,
    find_profile,
)
from headway.steering.program import HeadEdit, QueryScope
from headway.steering.residual import Positions, Strength, strength_of
from headway.steering.vectors import VectorProfile


class ACT(Method):
    """Add a fixed vector to the output of attention heads."""

    name: ClassVar[str] = "act"
    method: Literal["act"]
    profile: str
    strength: Strength = "profile"
    layers: Literal["profile"] | list[int] = "profile"
    scope: Positions = "from_last_prompt_token"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """shift_h = strength * shift on the heads of the profile; query scope: `scope`."""
        named, profile = find_profile(
            self.profile, "act", VectorProfile, geometry, f"{param}.profile"
        )
        heads = profile.header.heads
        if not isinstance(self.layers, str):
            layers = check_layers(self.layers, geometry, f"{param}.layers")
            steered = sorted({layer for layer, _ in heads})
            for layer in layers:
                if layer not in steered:
                    message = f"the profile has no head in layer {layer}; it has: {steered}"
                    raise SteeringError(Reason.BAD_PARAM, message, f"{param}.layers")
            heads = tuple(head for head in heads if head[0] in layers)
        strength = strength_of(self, profile)
        shape = geometry.num_layers, geometry.num_heads, geometry.head_size
        shift = np.zeros(shape, np.float32)
        for row, head in enumerate(profile.header.heads):
            if head in heads:
                shift[head] = strength * profile.tensors["shifts"][row]
        words = HeadWords.identity(geometry)
        words.table[..., HeadField.SHIFT_INDEX], shifts = index_shifts(shift)
        edit = HeadEdit(HeadWords(words.table, shifts), QueryScope(self.scope))
        details = {
            "profile": named,
            "digest": f"sha256:{profile.digest}",
            "strength": strength,
            "layers": sorted({layer for layer, _ in heads}),
            "heads": [list(head) for head in heads],
            "scope": self.scope,
        }
        return CompiledMethod((edit,), profile=profile.digest, details=details)
