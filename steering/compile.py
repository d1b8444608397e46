"""From a steering spec to the program that carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.program import (
    AppliedMethod,
    Feature,
    HeadEdit,
    QueryScope,
    SteeringProgram,
)
from headway.steering.registry import parse_method
from headway.steering.schema import SteeringSpec

Presets = Mapping[str, Sequence[dict[str, Any]]]
"""Preset name -> the `methods` list it stands for."""

ENGINE_FEATURES = frozenset({Feature.HEAD_AFFINE})
"""What Headway's engine can do today."""


def compile_spec(
    spec: SteeringSpec,
    geometry: ModelGeometry,
    presets: Presets | None = None,
    param: str = "steering",
) -> SteeringProgram:
    """Compile a spec for a model.

    The methods are applied together: scales multiply, edits of the same scope become one table.

    Raises SteeringError naming the JSON path, for unknown presets and methods, options that do
    not fit the model, methods that conflict, and edits this engine cannot do.
    """
    values, path = _methods(spec, presets or {}, param)
    edits: list[HeadEdit] = []
    applied: list[AppliedMethod] = []
    warnings: list[str] = []
    for index, value in enumerate(values):
        where = f"{path}[{index}]"
        method = parse_method(value, where)
        compiled = method.compile(geometry, where)
        edits.extend(compiled.head_edits)
        applied.append(AppliedMethod(method.name, compiled.details))
        warnings.extend(compiled.warnings)
    program = SteeringProgram(
        head_edits=compose(edits, path),
        applied=tuple(applied),
        warnings=tuple(warnings),
        report=spec.report,
    )
    missing = sorted(program.features - ENGINE_FEATURES)
    if missing:
        message = f"this version's engine cannot do: {', '.join(missing)}"
        raise SteeringError(Reason.UNSUPPORTED, message, path)
    return program


def compose(edits: Sequence[HeadEdit], param: str) -> tuple[HeadEdit, ...]:
    """Merge the edits of each query scope, in the order given; identities are dropped.

    Raises SteeringError(E_CONFLICT) where two edits redistribute the attention of one scope.
    """
    merged: dict[QueryScope, HeadEdit] = {}
    for edit in edits:
        earlier = merged.get(edit.scope)
        if earlier is None:
            merged[edit.scope] = edit
            continue
        try:
            words = earlier.words.then(edit.words)
        except ValueError as error:
            raise SteeringError(Reason.CONFLICT, str(error), param) from None
        merged[edit.scope] = HeadEdit(words, edit.scope)
    kept = (edit for edit in merged.values() if not edit.words.is_identity)
    return tuple(sorted(kept, key=lambda edit: edit.scope))


def _methods(
    spec: SteeringSpec, presets: Presets, param: str
) -> tuple[Sequence[dict[str, Any]], str]:
    if spec.methods is not None:
        return spec.methods, f"{param}.methods"
    if spec.preset is None or spec.preset not in presets:
        known = ", ".join(sorted(presets)) or "none"
        message = f'there is no preset "{spec.preset}"; the presets are: {known}'
        raise SteeringError(Reason.PRESET_NOT_FOUND, message, f"{param}.preset")
    return presets[spec.preset], f"{param}.preset({spec.preset}).methods"
