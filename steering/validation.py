"""From untrusted JSON to pydantic models, with errors that say where and what."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from headway.steering.errors import Reason, SteeringError

MAX_SPEC_BYTES = 64 * 1024
"""Largest inline steering spec, in bytes of JSON."""


class StrictModel(BaseModel):
    """Unknown keys, NaN, infinities and values of a merely similar type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def dump_spec(value: Any, param: str, max_bytes: int = MAX_SPEC_BYTES) -> str:
    """JSON text of a value, or a SteeringError if it is too large or not JSON."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise SteeringError(Reason.BAD_PARAM, f"must be JSON: {error}", param) from None
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > max_bytes:
        message = f"has {size} bytes; at most {max_bytes} are allowed"
        raise SteeringError(Reason.TOO_LARGE, message, param)
    return text


def validate(model: type[Model], value: Any, param: str, max_bytes: int = MAX_SPEC_BYTES) -> Model:
    """Validate a JSON value (parsed, or as text, of at most `max_bytes`) against a model.

    Raises SteeringError: E_TOO_LARGE, or E_BAD_PARAM that names the deepest offending element as a
    JSON path under `param`, the value found there and what is allowed.
    """
    text = dump_spec(value, param, max_bytes)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        # Parsed once more so that the error can point into what the client sent.
        parsed = _parse(text)
        path, problem = max(
            ((_walk(parsed, item["loc"]), item) for item in error.errors(include_url=False)),
            key=lambda found: len(found[0]),
        )
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            allowed = ", ".join(model.model_fields)
            message = f"unknown key; the keys here are: {allowed}"
            if len(problem["loc"]) > 1:  # of a model inside this one
                message = "unknown key"
        elif problem["type"] != "missing":
            message = f"{message}, got {_short(problem['input'])}"
        raise SteeringError(Reason.BAD_PARAM, message, json_path(param, path)) from None


def json_path(root: str, path: tuple[str | int, ...]) -> str:
    """`root` followed by keys and indices: `steering.methods[0].alpha`."""
    for element in path:
        root += f"[{element}]" if isinstance(element, int) else f".{element}"
    return root


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _walk(value: Any, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The part of a pydantic location that exists in the input.

    Pydantic also puts the tried members of a union in a location; they are no path for a client.
    """
    path: list[str | int] = []
    for position, element in enumerate(loc):
        try:
            value = value[element]
        except (KeyError, IndexError, TypeError):
            if position == len(loc) - 1 and isinstance(value, dict):
                path.append(element)  # a missing key
            continue
        path.append(element)
    return tuple(path)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."
