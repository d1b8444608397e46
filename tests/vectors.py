"""Vector profiles for tests, drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from headway.steering import ModelGeometry
from headway.steering.vectors import VectorHeader, VectorProfile


def drawn_profile(
    geometry: ModelGeometry,
    kind: str = "gact",
    layers: tuple[int, ...] = (1, 2),
    num_clusters: int = 3,
    seed: int = 0,
    **header: Any,
) -> VectorProfile:
    """Directions of norm 1 (gact, caa), or shifts of the heads (layer, 0) and (layer, 1) (act)."""
    draw = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    if kind == "act":
        header["heads"] = tuple((layer, head) for layer in layers for head in (0, 1))
        shape: tuple[int, ...] = len(header["heads"]), geometry.head_size
        tensors["shifts"] = draw.standard_normal(shape).astype(np.float32)
        layers = ()
    else:
        shape = len(layers), num_clusters if kind == "gact" else 1, geometry.hidden_size
        rows = draw.standard_normal(shape).astype(np.float32)
        tensors["directions"] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    if kind == "gact":
        tensors["probe_weights"] = draw.standard_normal(shape).astype(np.float32)
        tensors["probe_bias"] = draw.standard_normal(shape[:2]).astype(np.float32)
    made = VectorHeader.of(geometry, kind=kind, layers=layers, **header)
    return VectorProfile(made, tensors)
