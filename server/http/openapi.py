"""What the OpenAPI document says of Headway's routes beyond what FastAPI sees in their signatures.

The bodies of the registry's routes are read by hand, so that they are bounded before they are
parsed, and `steering` is judged by the routes, so that its errors have our shape and paths. Their
schemas stand here: what clients are generated from, and what tests draw requests from.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from headway.server.registry.documents import ProfileContent
from headway.server.registry.feedback import Verdict
from headway.steering import Reason
from headway.steering.errors import HTTP_STATUS
from headway.steering.registry import METHODS
from headway.steering.schema import MAX_METHODS, SteeringSpec

DEFINITIONS = "#/$defs/"


class ErrorDetail(BaseModel):
    """An error of OpenAI's shape. param: a JSON path; reason: a stable word, if it is Headway's."""

    message: str
    type: str
    param: str | None = None
    code: int
    reason: str | None = None


class SteeringErrorResponse(BaseModel):
    """The body of an error."""

    error: ErrorDetail


def errors(*reasons: Reason) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may raise these."""
    found: dict[int | str, dict[str, Any]] = {}
    for reason in reasons:
        status = HTTP_STATUS.get(reason, 400)
        entry = found.setdefault(status, {"model": SteeringErrorResponse, "description": ""})
        entry["description"] = ", ".join(filter(None, (entry["description"], str(reason))))
    return found


def body(schema: dict[str, Any], media_type: str = "application/json") -> dict[str, Any]:
    """The `openapi_extra` of a route that reads its body by hand."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without `$defs`, what they hold in the place of each reference.

    Fit for any place in the document, whose own references go elsewhere.
    """
    definitions = schema.get("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(each) for each in value]
        if not isinstance(value, dict):
            return value
        name = str(value.get("$ref", "")).removeprefix(DEFINITIONS)
        rest = {key: resolve(each) for key, each in value.items() if key not in ("$ref", "$defs")}
        return resolve(definitions[name]) | rest if name in definitions else rest

    found: dict[str, Any] = resolve(schema)
    return found


def _methods() -> dict[str, Any]:
    choices = [inlined(method.model_json_schema()) for method in METHODS.values()]
    return {"type": "array", "minItems": 1, "maxItems": MAX_METHODS, "items": {"oneOf": choices}}


METHODS_SCHEMA = _methods()


def _spec() -> dict[str, Any]:
    schema = inlined(SteeringSpec.model_json_schema())
    schema["properties"]["methods"] = {"anyOf": [METHODS_SCHEMA, {"type": "null"}]}
    # The word for an object with that level alone.
    report = schema["properties"]["report"]
    levels = report["properties"]["level"]["enum"]
    schema["properties"]["report"] = {"anyOf": [{"type": "string", "enum": levels}, report]}
    return schema


SPEC_SCHEMA: dict[str, Any] = {"anyOf": [_spec(), {"type": "null"}]}
"""The `steering` field of a request."""

COMPILE_BODY = body(
    {"type": "object", "required": ["steering"], "properties": {"steering": SPEC_SCHEMA}}
)
PRESET_BODY = body(
    {
        "type": "object",
        "required": ["methods"],
        "properties": {
            "methods": METHODS_SCHEMA,
            "description": {"anyOf": [{"type": "string", "maxLength": 1024}, {"type": "null"}]},
        },
        "additionalProperties": False,
    }
)
PROFILE_BODY = body(inlined(ProfileContent.model_json_schema()))
FEEDBACK_BODY = body(inlined(Verdict.model_json_schema()))
ARTIFACT_BODY = body({"type": "string", "format": "binary"}, "application/octet-stream")

ADMIN = (Reason.UNAUTHORIZED, Reason.FORBIDDEN, Reason.STEERING_FAILED)
"""What every change of the registry may meet; the last where the disk fails."""
COMPILING = (
    Reason.BAD_PARAM,
    Reason.UNKNOWN_METHOD,
    Reason.LAYER_RANGE,
    Reason.HEAD_RANGE,
    Reason.NO_IMAGE,
    Reason.NO_SINK_DIMS,
    Reason.CONFLICT,
    Reason.UNSUPPORTED,
    Reason.QUANTIZED,
    Reason.PROFILE_MISMATCH,
    Reason.PRESET_NOT_FOUND,
    Reason.PROFILE_NOT_FOUND,
    Reason.TOO_LARGE,
)
"""What any steering may meet before it runs."""
Responses = dict[int | str, dict[str, Any]]

_CREATED: Responses = {
    201: {"description": "It is new; 200 where it replaces another, or was there already."}
}
UPLOAD = _CREATED | errors(
    Reason.BAD_PARAM, *ADMIN, Reason.IN_USE, Reason.PROFILE_MISMATCH, Reason.TOO_LARGE
)
PRESET = _CREATED | errors(*COMPILING, *ADMIN, Reason.IN_USE)
DELETE = errors(
    Reason.BAD_PARAM, *ADMIN, Reason.PROFILE_NOT_FOUND, Reason.PRESET_NOT_FOUND, Reason.IN_USE
)
LOOK = errors(Reason.BAD_PARAM, Reason.PROFILE_NOT_FOUND)
ARTIFACT: Responses = {
    200: {"content": {"application/octet-stream": {}}},
    304: {"description": "The client has it, as its If-None-Match says."},
    **LOOK,
}
REPORT: Responses = {
    404: {"model": SteeringErrorResponse, "description": "No report of that request is kept."}
}
FEEDBACK = errors(
    Reason.BAD_PARAM,
    *ADMIN,
    Reason.UNSUPPORTED,
    Reason.PROFILE_NOT_FOUND,
    Reason.REQUEST_NOT_FOUND,
    Reason.IN_USE,
    Reason.ALREADY_GIVEN,
    Reason.PROFILE_MISMATCH,
    Reason.TOO_LARGE,
    Reason.CAPACITY,
)
COMPILE = errors(*COMPILING)
