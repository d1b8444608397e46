"""What every method file provides, and the checks that several of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from headway.steering.artifacts import ResidualArtifact
from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.program import (
    HeadEdit,
    HeadSelection,
    ProbePoints,
    ResidualEdit,
    SaliencyRule,
    SamplingGate,
    SinkRule,
)
from headway.steering.spans import SpanSelector
from headway.steering.validation import StrictModel

HeadIndex = Annotated[
    list[int],
    Field(min_length=2, max_length=2, description="[layer, head], 0-based, query heads"),
]


@dataclass(frozen=True)
class CompiledMethod:
    """One method, compiled: its edits, what to echo to the client, and warnings.

    artifacts: those that its residual edits name. profile: digest (hex) of the vector profile that
    its vectors are from.
    sink_rule: which tokens its key classes mean by SINK. marks: which spans by EMPHASISED.
    needs_image: whether it means nothing without an image. head_selection: heads to be chosen.
    saliency: which saliency it means. sampling_gate: which candidates it refuses by it.
    probes: those of its residual edits that are to be read for feedback.
    """

    head_edits: tuple[HeadEdit, ...] = ()
    residual_edits: tuple[ResidualEdit, ...] = ()
    artifacts: tuple[ResidualArtifact, ...] = ()
    head_selection: HeadSelection | None = None
    sink_rule: SinkRule | None = None
    saliency: SaliencyRule | None = None
    sampling_gate: SamplingGate | None = None
    marks: tuple[SpanSelector, ...] = ()
    needs_image: bool = False
    profile: str | None = None
    probes: ProbePoints | None = None
    details: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Method(StrictModel):
    """Options of a method as they stand in a request; a subclass per method, one per file.

    The `method` key of a request names the subclass by `name` and is checked by the registry.
    """

    name: ClassVar[str]
    method: str

    @abstractmethod
    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """Compile for a model; `param` is the JSON path of this method in the request.

        Raises SteeringError where the options do not fit the model.
        """


def require_images(geometry: ModelGeometry, param: str) -> None:
    """Raise SteeringError(E_NO_IMAGE) for a model that takes no images."""
    if not geometry.supports_images:
        message = "this method steers by the image of the prompt, and this model takes no images"
        raise SteeringError(Reason.NO_IMAGE, message, param)


def check_layers(layers: Sequence[int], geometry: ModelGeometry, param: str) -> list[int]:
    """The layers, checked against the model and against repetition, in ascending order.

    Raises SteeringError: E_LAYER_RANGE, or E_BAD_PARAM for none or a repeated one.
    """
    if not layers:
        raise SteeringError(Reason.BAD_PARAM, "selects no layer", param)
    for index, layer in enumerate(layers):
        _check_layer(layer, geometry, f"{param}[{index}]")
        if layer in layers[:index]:
            message = f"layer {layer} is given twice"
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}[{index}]")
    return sorted(layers)


def select_heads(
    heads: Literal["all"] | Sequence[Sequence[int]],
    layers: str | Sequence[int],
    default_layers: Iterable[int],
    geometry: ModelGeometry,
    param: str,
) -> list[tuple[int, int]]:
    """The (layer, head) pairs of a method with the options `heads` and `layers`.

    Explicit heads stand for themselves; "all" means all heads of the layers, which are the
    default ones where `layers` is a word. Raises SteeringError, also where both are explicit.
    """
    if heads == "all":
        if isinstance(layers, str):
            chosen = list(default_layers)
        else:
            chosen = check_layers(layers, geometry, f"{param}.layers")
        return [(layer, head) for layer in chosen for head in range(geometry.num_heads)]
    if not isinstance(layers, str):
        message = "explicit heads name their layers; leave `layers` out"
        raise SteeringError(Reason.BAD_PARAM, message, f"{param}.layers")
    return check_heads(heads, geometry, f"{param}.heads")


def describe_heads(
    heads: Literal["all"] | Sequence[Sequence[int]], chosen: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """What to echo of a selection: its layers, and its heads where they were given one by one."""
    explicit = "all" if heads == "all" else [list(pair) for pair in chosen]
    return {"layers": sorted({layer for layer, _ in chosen}), "heads": explicit}


def scaled_layers(first: int, last: int, geometry: ModelGeometry) -> range:
    """Layers first .. last of a 32-layer model, at the same relative depth of this one."""
    scale = geometry.num_layers / 32
    return range(round(first * scale), min(round(last * scale), geometry.num_layers - 1) + 1)


def check_heads(
    heads: Sequence[Sequence[int]], geometry: ModelGeometry, param: str
) -> list[tuple[int, int]]:
    """The (layer, head) pairs, checked against the model and against repetition.

    Raises SteeringError: E_LAYER_RANGE, E_HEAD_RANGE, or E_BAD_PARAM for none or a repeated one.
    """
    if not heads:
        raise SteeringError(Reason.BAD_PARAM, "selects no head", param)
    seen: set[tuple[int, int]] = set()
    for index, (layer, head) in enumerate(heads):
        where = f"{param}[{index}]"
        _check_layer(layer, geometry, f"{where}[0]")
        if not 0 <= head < geometry.num_heads:
            allowed = f"0 .. {geometry.num_heads - 1}"
            message = f"head {head} does not exist; this model has query heads {allowed}"
            raise SteeringError(Reason.HEAD_RANGE, message, f"{where}[1]")
        if (layer, head) in seen:
            message = f"head {head} of layer {layer} is given twice"
            raise SteeringError(Reason.BAD_PARAM, message, where)
        seen.add((layer, head))
    return sorted(seen)


Kind = TypeVar("Kind")


def find_profile(
    reference: str, kind: str, as_class: type[Kind], geometry: ModelGeometry, param: str
) -> tuple[str, Kind]:
    """A profile of the server and the name that stands for its very version.

    kind: which it must be; as_class: the class of such profiles. Raises SteeringError:
    E_PROFILE_NOT_FOUND, E_BAD_PARAM for one of another kind, E_PROFILE_MISMATCH.
    """
    profiles = geometry.profiles
    found = profiles.find(reference) if profiles is not None else None
    if found is None:
        known = ", ".join(profiles.names() if profiles is not None else ()) or "none"
        message = f'there is no profile "{reference[:80]}"; the profiles are: {known}'
        raise SteeringError(Reason.PROFILE_NOT_FOUND, message, param)
    if found.profile.kind != kind or not isinstance(found.profile, as_class):
        message = f'"{reference[:80]}" is a profile of the kind {found.profile.kind}, not {kind}'
        raise SteeringError(Reason.BAD_PARAM, message, param)
    found.profile.check_model(geometry, param)
    return found.reference, found.profile


def _check_layer(layer: int, geometry: ModelGeometry, param: str) -> None:
    if not 0 <= layer < geometry.num_layers:
        allowed = f"0 .. {geometry.num_layers - 1}"
        message = f"layer {layer} does not exist; this model has layers {allowed}"
        raise SteeringError(Reason.LAYER_RANGE, message, param)
