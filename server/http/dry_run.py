"""What a request body would get, without running it; for the compile route and command."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from headway.server.http.carriage import take_carriages
from headway.server.http.prompts import check_prompt
from headway.server.http.state import SteeringState
from headway.steering import Reason, SteeringError, SteeringProgram
from headway.steering.program import Feature

COST_CLASSES = (
    (Feature.SAMPLING_GATE, "sampling"),
    (Feature.ATTENTION_EDIT, "attention"),
    (Feature.RESIDUAL_EDIT, "residual"),
    (Feature.READOUT, "readout"),
    (Feature.HEAD_AFFINE, "affine"),
)
"""What a program costs is set by the dearest feature it needs, dearest first."""


def compile_body(state: SteeringState, body: dict[str, Any]) -> SteeringProgram:
    """The program of a request body. Raises the SteeringError that the request would meet."""
    carriages, rest = take_carriages(body)
    model = body.get("model")
    options = SimpleNamespace(**rest)
    steering = state.resolve(carriages, model if isinstance(model, str) else None, options)
    if steering is None:
        raise SteeringError(Reason.BAD_PARAM, "the request asks for no steering")
    check_prompt(steering.program, body)
    return steering.program


def describe(program: SteeringProgram) -> dict[str, Any]:
    """The JSON form of a compiled program."""
    return {
        "fingerprint": program.fingerprint,
        "identity": program.is_identity,
        "methods": [applied.as_dict() for applied in program.applied],
        "features": sorted(program.features),
        "cost_class": cost_class(program),
        "warnings": list(program.warnings),
    }


def cost_class(program: SteeringProgram) -> str:
    """The dearest kind of edit in a program, "none" if it changes nothing."""
    if program.is_identity:
        return "none"
    if program.saliency is not None:
        return "sampling"  # reading saliencies takes the same pass as refusing by them
    return next(name for feature, name in COST_CLASSES if feature in program.features)
