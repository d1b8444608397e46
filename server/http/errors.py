"""Steering errors as HTTP answers, in the shape of the OpenAI API."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response

from headway.server.http import metrics
from headway.steering import Reason, SteeringError

ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
}
"""The `type` of an error by HTTP status, as vLLM words it where vLLM has the status."""


def error_body(error: SteeringError) -> dict[str, Any]:
    """`{"error": {...}}`: the fields of vLLM's own errors, and the stable `reason`."""
    status = HTTPStatus(error.status)
    return {
        "error": {
            "message": error.message,
            "type": ERROR_TYPES.get(status, status.phrase),
            "param": error.param,
            "code": int(status),
            "reason": str(error.reason),
        }
    }


def error_response(error: SteeringError) -> Response:
    """The HTTP answer of an error."""
    # ASCII: the message may quote what the client sent, lone surrogates included.
    body = json.dumps(error_body(error), ensure_ascii=True)
    headers = {"retry-after": "1"} if error.reason is Reason.CAPACITY else None
    return Response(body, error.status, headers, media_type="application/json")


async def steering_error_handler(request: Request, error: Exception) -> Response:
    """The app's exception handler for SteeringError: counts a refusal and answers it.

    A failure was counted where it arose.
    """
    assert isinstance(error, SteeringError)
    if error.reason is not Reason.STEERING_FAILED:
        metrics.REFUSED.labels(reason=str(error.reason)).inc()
    return error_response(error)
