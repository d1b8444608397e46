"""The route for feedback on served requests, which refines the probes of a profile."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from headway.server.engine.config import unsupported_feedback
from headway.server.http import openapi
from headway.server.http.registry_routes import ADMIN, in_thread, read_json_body
from headway.server.http.state import steering_state
from headway.server.registry.feedback import Verdict
from headway.steering import Reason, SteeringError

router = APIRouter(prefix="/v1/steering")


@router.post(
    "/profiles/{name}/feedback",
    dependencies=ADMIN,
    responses=openapi.FEEDBACK,
    openapi_extra=openapi.FEEDBACK_BODY,
)
async def give_feedback(name: str, raw_request: Request) -> JSONResponse:
    """Feedback on a request that the profile steered: one gradient step on its probes.

    body: `{"request_id": "...", "label": k}`, k the cluster that was wanted, or `{"request_id":
    "...", "preferred": true}`, whether those that the probes picked were right. When as many pieces
    are there as the profile's batch, they make its next version.
    """
    state = steering_state(raw_request)
    reason = unsupported_feedback(state.vllm_config)
    if reason is not None:
        raise SteeringError(Reason.UNSUPPORTED, reason, "feedback")
    verdict = Verdict.parse(await read_json_body(raw_request, "feedback"), "feedback")
    assert state.feedback is not None, "a server has a registry"
    return JSONResponse(await in_thread(state.feedback.give, name, verdict))
