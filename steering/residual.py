"""What the methods that edit the residual stream with a vector profile have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.methods.base import CompiledMethod, check_layers, find_profile
from headway.steering.program import QueryScope, ResidualEdit, ResidualForm
from headway.steering.vectors import VectorProfile

Strength = Annotated[float, Field(ge=-100.0, le=100.0)] | Literal["profile"]
"""A number, or the strength that the profile's header gives."""

Positions = Literal["from_last_prompt_token", "output", "all"]
"""The query scopes between which activation steering lets a request choose."""


class _NamesVectors(Protocol):
    """The options that methods with a vector profile for residual edits share."""

    @property
    def profile(self) -> str: ...

    @property
    def strength(self) -> Literal["profile"] | float: ...

    @property
    def layers(self) -> Literal["profile"] | list[int]: ...


@dataclass(frozen=True)
class ResidualMethod:
    """The vector profile that a method edits the residual stream with, and how."""

    reference: str
    profile: VectorProfile
    layers: tuple[int, ...]
    strength: float
    form: ResidualForm

    def compiled(
        self, scope: QueryScope, chosen: int | None = None, **details: Any
    ) -> CompiledMethod:
        """The method, compiled; chosen: the direction that is always taken. Details are echoed.

        A strength of 0 changes nothing and has no edits.
        """
        vectors = {layer: self.profile.artifacts[layer] for layer in self.layers}
        edits = [
            ResidualEdit(
                layer,
                artifact.digest,
                self.strength,
                scope,
                chosen,
                self.profile.header.site,
                self.form,
            )
            for layer, artifact in vectors.items()
            if self.strength != 0.0
        ]
        shown = {
            "profile": self.reference,
            "digest": f"sha256:{self.profile.digest}",
            "strength": self.strength,
            "layers": list(self.layers),
            "site": str(self.profile.header.site),
            **details,
            "scope": str(scope),
        }
        artifacts = tuple(vectors.values()) if edits else ()
        return CompiledMethod(
            residual_edits=tuple(edits),
            artifacts=artifacts,
            profile=self.profile.digest,
            details=shown,
        )


def residual_method(
    method: _NamesVectors, kind: str, geometry: ModelGeometry, param: str, form: ResidualForm
) -> ResidualMethod:
    """What a method with a vector profile of a kind edits.

    Raises SteeringError as `find_profile` and `check_layers` do, and E_BAD_PARAM for a layer that
    the profile has nothing for.
    """
    where = f"{param}.profile"
    named, profile = find_profile(method.profile, kind, VectorProfile, geometry, where)
    layers = profile.header.layers
    if not isinstance(method.layers, str):
        asked = check_layers(method.layers, geometry, f"{param}.layers")
        for layer in asked:
            if layer not in layers:
                message = f"the profile has nothing for layer {layer}; it has: {list(layers)}"
                raise SteeringError(Reason.BAD_PARAM, message, f"{param}.layers")
        layers = tuple(asked)
    return ResidualMethod(named, profile, layers, strength_of(method, profile), form)


def strength_of(method: _NamesVectors, profile: VectorProfile) -> float:
    """How strongly a method is applied."""
    return profile.header.strength if isinstance(method.strength, str) else method.strength
