"""Which saliency is meant where a request does not say (SGRS, arXiv 2601.20279).

The paper's code reads layers 6, 7 and 8 of a model of 32; here those at the same relative depth.
"""

from __future__ import annotations

from headway.steering.geometry import ModelGeometry
from headway.steering.program import QueryScope, SaliencyRule

LAYERS_OF_32 = (6, 7, 8)


def default_layers(geometry: ModelGeometry) -> tuple[int, ...]:
    """The target layers for a model: distinct, ascending, at least one."""
    last = geometry.num_layers - 1
    scaled = (round(layer * geometry.num_layers / 32) for layer in LAYERS_OF_32)
    return tuple(sorted({min(layer, last) for layer in scaled}))


def default_rule(geometry: ModelGeometry) -> SaliencyRule:
    """What is read where a request asks for saliencies and names no method that has a rule."""
    return SaliencyRule(default_layers(geometry), QueryScope.OUTPUT)
