"""From a steering spec to the program that carries it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.methods.base import CompiledMethod
from headway.steering.program import (
    AppliedMethod,
    Feature,
    HeadEdit,
    QueryScope,
    Readout,
    ResidualEdit,
    SaliencyRule,
    SteeringProgram,
)
from headway.steering.registry import parse_method
from headway.steering.saliency import default_rule
from headway.steering.schema import SteeringSpec

Presets = Mapping[str, Sequence[dict[str, Any]]]
"""Preset name -> the `methods` list it stands for."""

ENGINE_FEATURES = frozenset(
    {
        Feature.HEAD_AFFINE,
        Feature.HEAD_SELECTION,
        Feature.ATTENTION_EDIT,
        Feature.RESIDUAL_EDIT,
        Feature.SAMPLING_GATE,
        Feature.READOUT,
    }
)
"""What Headway's engine can do today."""


def compile_spec(
    spec: SteeringSpec,
    geometry: ModelGeometry,
    presets: Presets | None = None,
    param: str = "steering",
) -> SteeringProgram:
    """Compile a spec for a model.

    The methods are applied together: scales multiply, biases add and shifts add, after all scales;
    edits of the same scope become one table.

    Raises SteeringError naming the JSON path, for unknown presets and methods, options that do
    not fit the model, methods that conflict, and edits this engine cannot do.
    """
    values, path = _methods(spec, presets or {}, param)
    methods = [parse_method(value, f"{path}[{index}]") for index, value in enumerate(values)]
    parts = [
        (f"{path}[{index}]", method.name, method.compile(geometry, f"{path}[{index}]"))
        for index, method in enumerate(methods)
    ]
    refuse_conflicts(parts)
    edits = compose([edit for _, _, part in parts for edit in part.head_edits])
    saliency = _saliency(spec, geometry, [part for _, _, part in parts])
    marked = [(where, part) for where, _, part in parts if part.marks and _edits(part)]
    program = SteeringProgram(
        head_edits=edits,
        sink_rule=next((part.sink_rule for _, _, part in parts if part.sink_rule), None),
        marks=marked[0][1].marks if marked else (),
        marks_param=f"{marked[0][0]}.spans" if marked else "",
        image_param=next((where for where, _, part in parts if part.needs_image), ""),
        residual_edits=_ordered(edit for _, _, part in parts for edit in part.residual_edits),
        artifacts=tuple(each for _, _, part in parts for each in part.artifacts),
        head_selection=next((part.head_selection for _, _, part in parts if _selects(part)), None),
        selection_param=next((where for where, _, part in parts if _selects(part)), ""),
        saliency=saliency,
        sampling_gate=next(
            (part.sampling_gate for _, _, part in parts if part.sampling_gate), None
        ),
        readouts=_readouts(spec, edits, saliency, [part for _, _, part in parts]),
        applied=tuple(_applied(name, part) for _, name, part in parts),
        warnings=tuple(warning for _, _, part in parts for warning in part.warnings),
        report=spec.report.level,
    )
    missing = sorted(program.features - ENGINE_FEATURES)
    if missing:
        message = f"this version's engine cannot do: {', '.join(missing)}"
        raise SteeringError(Reason.UNSUPPORTED, message, path)
    return program


def refuse_conflicts(parts: Sequence[tuple[str, str, CompiledMethod]]) -> None:
    """Raise SteeringError(E_CONFLICT), naming both, where two methods do not go together.

    parts: (JSON path, name, compiled method) of each method. Query scopes overlap, so that edits
    of different scopes conflict just as edits of the same.
    """
    for later, (path, name, part) in enumerate(parts):
        for earlier_path, earlier_name, earlier in parts[:later]:
            both = f"{name} and {earlier_name} ({earlier_path})"
            for edit in part.head_edits:
                for other in earlier.head_edits:
                    at = other.words.conflict(edit.words)
                    if at is not None:
                        where = f"layer {at[0]}, head {at[1]}"
                        message = f"{both} both redistribute the attention of {where}"
                        raise SteeringError(Reason.CONFLICT, message, path)
                    at = other.words.silences(edit.words) or edit.words.silences(other.words)
                    if at is not None:
                        where = f"layer {at[0]}, head {at[1]}"
                        message = f"of {both} one silences {where} and the other shifts it"
                        raise SteeringError(Reason.CONFLICT, message, path)
            if part.sink_rule and earlier.sink_rule and part.sink_rule != earlier.sink_rule:
                message = f"{both} tell sinks by different dimensions or thresholds"
                raise SteeringError(Reason.CONFLICT, message, path)
            at_both = {edit.point: edit for edit in earlier.residual_edits}
            for added in part.residual_edits:
                if added.point in at_both:
                    where = f"layer {added.layer} ({at_both[added.point].site})"
                    message = f"{both} both edit the residual stream of {where}"
                    raise SteeringError(Reason.CONFLICT, message, path)
            if _selects(part) and _selects(earlier):
                raise SteeringError(Reason.CONFLICT, f"{both} both choose heads", path)
            if part.saliency and earlier.saliency:
                message = f"{both} both refuse candidates for the next token"
                raise SteeringError(Reason.CONFLICT, message, path)
            if part.marks and earlier.marks and part.marks != earlier.marks:
                message = f"{both} emphasise different spans; give all spans to one"
                raise SteeringError(Reason.CONFLICT, message, path)


def compose(edits: Sequence[HeadEdit]) -> tuple[HeadEdit, ...]:
    """Merge the edits of each query scope; identities are dropped. Their order does not matter.

    Raises ValueError for edits that conflict.
    """
    merged: dict[QueryScope, HeadEdit] = {}
    for edit in edits:
        earlier = merged.get(edit.scope)
        words = edit.words if earlier is None else earlier.words.then(edit.words)
        merged[edit.scope] = HeadEdit(words, edit.scope)
    kept = (edit for edit in merged.values() if not edit.words.is_identity)
    return tuple(sorted(kept, key=lambda edit: edit.scope))


def _ordered(edits: Iterable[ResidualEdit]) -> tuple[ResidualEdit, ...]:
    """In the order in which a token meets them, so that the order of methods does not matter."""
    return tuple(sorted(edits, key=lambda edit: edit.point))


def _selects(part: CompiledMethod) -> bool:
    return part.head_selection is not None


def _edits(part: CompiledMethod) -> bool:
    return not all(edit.words.is_identity for edit in part.head_edits)


def _saliency(
    spec: SteeringSpec, geometry: ModelGeometry, parts: Sequence[CompiledMethod]
) -> SaliencyRule | None:
    """Of the method that has one, where it gates or saliencies are read; else the default."""
    rule = next((part.saliency for part in parts if part.saliency), None)
    if spec.report.saliency:
        return rule or default_rule(geometry)
    return rule if any(part.sampling_gate for part in parts) else None


def _readouts(
    spec: SteeringSpec,
    edits: Sequence[HeadEdit],
    saliency: SaliencyRule | None,
    parts: Sequence[CompiledMethod],
) -> tuple[Readout, ...]:
    edits_attention = not all(edit.words.is_affine for edit in edits)
    full = spec.report.level == "full"
    wanted = {
        Readout.CLASS_MASSES: full and edits_attention,
        Readout.SALIENCY: saliency is not None and (full or spec.report.saliency),
        Readout.PROBES: any(part.probes for part in parts),
    }
    return tuple(readout for readout, asked in wanted.items() if asked)


def _applied(name: str, part: CompiledMethod) -> AppliedMethod:
    layers = [edit.words.edits_attention.any(axis=-1) for edit in part.head_edits]
    edits = part.head_edits or part.residual_edits
    scope = edits[0].scope if edits else QueryScope.ALL
    return AppliedMethod(
        name,
        part.details,
        scope if part.saliency is None else None,
        edits=_edits(part) or bool(part.residual_edits) or _selects(part),
        attention_layers=int(sum(each.sum() for each in layers)),
        chooses_heads=_selects(part),
        gates=part.saliency is not None,
        profile=part.profile,
        probes=part.probes,
    )


def _methods(
    spec: SteeringSpec, presets: Presets, param: str
) -> tuple[Sequence[dict[str, Any]], str]:
    if spec.methods is not None:
        return spec.methods, f"{param}.methods"
    if spec.preset is None and spec.report.saliency:
        return (), param
    if spec.preset is None or spec.preset not in presets:
        known = ", ".join(sorted(presets)) or "none"
        message = f'there is no preset "{spec.preset}"; the presets are: {known}'
        raise SteeringError(Reason.PRESET_NOT_FOUND, message, f"{param}.preset")
    return presets[spec.preset], f"{param}.preset({spec.preset}).methods"
