"""What every importer gives: a direction for each layer, and the profile made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headway.steering import ModelGeometry
from headway.steering.program import ResidualSite
from headway.steering.vectors import VectorHeader, VectorProfile


@dataclass(frozen=True, eq=False)
class ImportedVectors:
    """The directions of a file, which its library adds to the output of decoder layers.

    source_format: name of the format. directions: layer, 0-based -> float32 [size]; the layer's
    output plus coefficient * direction is what the library computes, at all positions. facts:
    what else the file says, for people.
    """

    source_format: str
    directions: Mapping[int, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)


def make_profile(
    found: ImportedVectors, geometry: ModelGeometry, licence: str = "", command: str = ""
) -> VectorProfile:
    """The profile of the kind caa that adds the same; its strength is the library's coefficient.

    Raises ValueError, naming what the file has and what the model has, for directions that do not
    fit the model, and for values that are not finite.
    """
    layers = sorted(found.directions)
    if not layers:
        raise ValueError("the file holds no direction")
    for layer in layers:
        direction = found.directions[layer]
        if not 0 <= layer < geometry.num_layers:
            raise ValueError(
                f"the file has a direction for layer {layer}, the model has the layers 0 .. "
                f"{geometry.num_layers - 1}: made for another model?"
            )
        if direction.shape != (geometry.hidden_size,):
            raise ValueError(
                f"the direction of layer {layer} has the shape {list(direction.shape)}, the "
                f"model's hidden size is {geometry.hidden_size}: made for another model?"
            )
        if not np.isfinite(direction).all():
            raise ValueError(f"the direction of layer {layer} holds values that are not finite")
    header = VectorHeader(
        kind="caa",
        version=1,
        fingerprint=geometry.fingerprint,
        architecture=geometry.architecture,
        hidden_size=geometry.hidden_size,
        num_layers=geometry.num_layers,
        layers=tuple(layers),
        site=ResidualSite.BLOCK_OUTPUT,
        training={"source_format": found.source_format, **found.facts},
        licence=licence,
        command=command,
    )
    directions = np.stack([found.directions[layer] for layer in layers])[:, None]
    return VectorProfile(header, {"directions": directions.astype(np.float32)})
