"""Seam: how many requests whose tokens are judged by their saliency run at a time.

vLLM symbols relied on: `Scheduler.add_request`, `schedule`, `vllm_config` and
`_handle_blocked_waiting_request` (asked for every waiting request before it is scheduled);
`Request.status`, `is_finished`.

Each needs a pass of its own in every step, so that more of them would slow everybody down; those
beyond the limit wait, and never run without. A request keeps its place when it is preempted: those
that came later cannot lock it out.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request, RequestStatus

from headway.server.engine.config import max_sgrs_requests
from headway.server.engine.text_passes import payload_of

PLACED = (RequestStatus.RUNNING, RequestStatus.PREEMPTED)
"""A preempted request has run before, and keeps its place."""


def is_gated(request: Request) -> bool:
    """Whether the saliency of its tokens is needed, to refuse some or to report it."""
    return bool((payload_of(request) or {}).get("saliency"))


class LimitsGatedRequests:
    """Mixed into a scheduler, before `RunsTextPasses`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gated: dict[str, Request] = {}
        self._most_gated = max_sgrs_requests(self.vllm_config)  # type: ignore[attr-defined]

    def add_request(self: Any, request: Request) -> None:
        # More input of a resumable request comes as a request of the same id, which is not kept.
        if is_gated(request) and request.request_id not in self.requests:
            self._gated[request.request_id] = request
        super().add_request(request)  # type: ignore[misc]

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._gated:
            self._gated = {
                name: each for name, each in self._gated.items() if not each.is_finished()
            }
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self: Any, request: Request) -> bool:
        ready: bool = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        return ready and self._may_start(request)

    def _may_start(self, request: Request) -> bool:
        """Whether a waiting request may run as far as this limit goes."""
        if request.status == RequestStatus.PREEMPTED or request.request_id not in self._gated:
            return True
        placed = sum(each.status in PLACED for each in self._gated.values())
        return placed < self._most_gated
