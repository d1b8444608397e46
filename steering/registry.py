"""The methods a request may name. Adding one is its file and its line here."""

from __future__ import annotations

from typing import Any

from headway.steering.errors import Reason, SteeringError
from headway.steering.methods.act import ACT
from headway.steering.methods.base import Method
from headway.steering.methods.caa import CAA
from headway.steering.methods.emphasis import Emphasis
from headway.steering.methods.gact import GACT
from headway.steering.methods.head_ablation import HeadAblation
from headway.steering.methods.head_scale import HeadScale
from headway.steering.methods.locore import LocoRE
from headway.steering.methods.sgrs import SGRS
from headway.steering.methods.var import VAR
from headway.steering.methods.vhr import VHR
from headway.steering.validation import validate

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        VHR,
        VAR,
        LocoRE,
        SGRS,
        GACT,
        CAA,
        ACT,
        Emphasis,
        HeadScale,
        HeadAblation,
    )
}


def parse_method(value: Any, param: str) -> Method:
    """Validate one element of `methods`.

    Raises SteeringError: E_UNKNOWN_METHOD, or E_BAD_PARAM with the JSON path of the culprit.
    """
    known = ", ".join(METHODS)
    name = value.get("method") if isinstance(value, dict) else None
    if not isinstance(name, str):
        message = f'must be an object with a "method" key; the methods are: {known}'
        raise SteeringError(Reason.BAD_PARAM, message, param)
    if name not in METHODS:
        message = f'there is no method "{name[:64]}"; the methods are: {known}'
        raise SteeringError(Reason.UNKNOWN_METHOD, message, f"{param}.method")
    return validate(METHODS[name], value, param)
