"""G-ACT: Gradient-refined Adaptive Activation Steering (arXiv 2506.18887).

Steering directions are clustered from activation differences, and a small probe per layer reads the
residual stream and picks one, which is added to what it read. Abstract and first figure were all
there was to go by: they establish the clusters, the probe per layer, that it is refined by gradient
steps, also while serving, and that only some layers are steered. The formula is Headway's own:

    k = argmax_k (W_{l,k} . h / rms(h) + b_{l,k})      h += strength * rms(h) * v_{l,k}

at the layers of the profile, from the last prompt token on; v are unit vectors, so that `strength`
is in units of the row's rms and |h| = rms * sqrt(hidden_size). `headway calibrate gact` makes the
profiles; METHODS of that are in `headway.server.calibration.gact`. Where the profile takes feedback
and its probe picks, what the probe reads at the last prompt token is kept for a refinement of it
(`headway.steering.refinement`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.methods.base import (
    CompiledMethod,
    Method,
)
from headway.steering.program import ProbePoints, QueryScope, ResidualForm
from headway.steering.residual import Positions, Strength, residual_method
from headway.steering.vectors import MAX_CLUSTERS


class GACT(Method):
    """Add the direction that a probe picks for each position to the residual stream."""

    name: ClassVar[str] = "gact"
    method: Literal["gact"]
    profile: str
    strength: Strength = "profile"
    layers: Literal["profile"] | list[int] = "profile"
    cluster: Literal["auto"] | Annotated[int, Field(ge=0, lt=MAX_CLUSTERS)] = "auto"
    scope: Positions = "from_last_prompt_token"

    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """A residual edit in the form `rms` at each of the layers; query scope: `scope`."""
        found = residual_method(self, "gact", geometry, param, ResidualForm.RMS)
        cluster = None if isinstance(self.cluster, str) else self.cluster
        if cluster is not None and cluster >= found.profile.num_clusters:
            allowed = f"0 .. {found.profile.num_clusters - 1}"
            message = f"cluster {cluster} does not exist; the profile has {allowed}"
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}.cluster")
        made = found.compiled(QueryScope(self.scope), cluster, cluster=self.cluster)
        if cluster is not None or self.scope == "output" or not found.profile.takes_feedback:
            return made
        points = {edit.layer: edit.point for edit in made.residual_edits}
        return replace(made, probes=ProbePoints(found.reference, points) if points else None)
