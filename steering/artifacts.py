"""What residual edits add: directions and the probe that picks one, named by their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class ResidualArtifact:
    """Directions of the residual stream with a linear probe over them; immutable.

    directions, probe_weights: float32 [num_clusters, hidden_size]; probe_bias: float32
    [num_clusters]. The probe reads a row divided by its rms; see `headway.kernels.residual_edit`
    for the formula and its source (G-ACT, arXiv 2506.18887).

    Raises ValueError for values that are not finite or do not fit together.
    """

    directions: np.ndarray
    probe_weights: np.ndarray
    probe_bias: np.ndarray

    def __post_init__(self) -> None:
        arrays = self.directions, self.probe_weights, self.probe_bias
        if any(array.dtype != np.float32 or not np.isfinite(array).all() for array in arrays):
            raise ValueError("directions and probes must be finite float32 values")
        if self.directions.ndim != 2 or not self.directions.size:
            raise ValueError("directions must be [num_clusters, hidden_size]")
        if self.probe_weights.shape != self.directions.shape:
            raise ValueError("probe_weights must be shaped as directions")
        if self.probe_bias.shape != self.directions.shape[:1]:
            raise ValueError("probe_bias must have a value for every cluster")

    @classmethod
    def constant(cls, direction: np.ndarray) -> ResidualArtifact:
        """One direction, float32 [hidden_size], which is always the one."""
        rows = direction[None]
        return cls(rows, np.zeros_like(rows), np.zeros(1, np.float32))

    @property
    def num_clusters(self) -> int:
        """Number of directions."""
        return len(self.directions)

    @property
    def num_bytes(self) -> int:
        """Memory of its values."""
        return self.directions.nbytes + self.probe_weights.nbytes + self.probe_bias.nbytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the content: the name that a `ResidualEdit` has for it."""
        digest = hashlib.sha256(repr(self.directions.shape).encode())
        for array in (self.directions, self.probe_weights, self.probe_bias):
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return digest.hexdigest()


def encode_artifact(artifact: ResidualArtifact) -> dict[str, Any]:
    """Plain values for `decode_artifact`."""
    return {
        "digest": artifact.digest,
        "shape": list(artifact.directions.shape),
        "directions": artifact.directions.astype("<f4").tobytes(),
        "probe_weights": artifact.probe_weights.astype("<f4").tobytes(),
        "probe_bias": artifact.probe_bias.astype("<f4").tobytes(),
    }


def decode_artifact(wire: dict[str, Any]) -> ResidualArtifact:
    """Raises ValueError or KeyError if the values are not those that were encoded."""
    clusters, hidden = wire["shape"]

    def array(name: str, *shape: int) -> np.ndarray:
        return np.frombuffer(wire[name], "<f4").reshape(shape).copy()

    artifact = ResidualArtifact(
        array("directions", clusters, hidden),
        array("probe_weights", clusters, hidden),
        array("probe_bias", clusters),
    )
    if artifact.digest != wire["digest"]:
        raise ValueError("the content of an artefact is not what its name says")
    return artifact
