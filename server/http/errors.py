"""Steering errors as HTTP answers, in the shape of the OpenAI API."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from headway.server.http import metrics
from headway.server.http.observation import Observation
from headway.steering import Reason, SteeringError

ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.REQUEST_TIMEOUT: "RequestTimeoutError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestTooLargeError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}
"""The `type` of an error by HTTP status, as vLLM words it where vLLM has the status."""

RETRY_HEADERS = {
    Reason.CAPACITY: {"retry-after": "1"},
    Reason.TIMEOUT: {"connection": "close"},  # the rest of the body would follow
    # Of a server that is ending: the next attempt must not reach it through the same connection.
    Reason.UNAVAILABLE: {"retry-after": "1", "connection": "close"},
}
"""Headers of errors that may be gone when the request is sent again."""

logger = logging.getLogger(__name__)


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
    headers = RETRY_HEADERS.get(error.reason)
    return Response(body, error.status, headers, media_type="application/json")


async def refuse_early(error: SteeringError, scope: Scope, receive: Receive, send: Send) -> None:
    """Count, log and answer a refusal in front of all routes."""
    metrics.REFUSED.labels(reason=str(error.reason)).inc()
    Observation(scope).end("failed", error=error)
    await error_response(error)(scope, receive, send)


def steering_failure(stage: str, why: str | Exception, request: str | None = None) -> SteeringError:
    """Count and log a failure that is no fault of the client, and what it is answered.

    stage: of a bounded set, as a label of metrics. why: of an error that nobody foresaw the client
    learns the kind; the log has the rest. request: which one, where that is known.
    """
    metrics.FAILURES.labels(stage=stage).inc()
    error = why if isinstance(why, Exception) else None
    if error is not None:
        why = f"{type(error).__name__}; the log of the server has more"
    of = f" (request {request})" if request else ""
    message = f"steering failed at stage {stage}: {why}{of}"
    logger.error("%s", message, exc_info=error)
    return SteeringError(Reason.STEERING_FAILED, message)


async def steering_error_handler(request: Request, error: Exception) -> Response:
    """The app's exception handler for SteeringError: counts and logs a refusal, and answers it.

    A failure was counted where it arose.
    """
    assert isinstance(error, SteeringError)
    if error.reason is not Reason.STEERING_FAILED:
        metrics.REFUSED.labels(reason=str(error.reason)).inc()
    Observation.of(request).end("failed", error=error)
    return error_response(error)
