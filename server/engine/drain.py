"""Seam: an engine that is shutting down still tells the reports of the requests it lets end.

vLLM symbols relied on: `vllm.v1.engine.core.EngineCoreProc`, of it `_handle_client_request`
(`ADD` with a request, `UTILITY` with client, call id, method and arguments),
`_reject_utility_in_shutdown`, `has_work`, asked before every turn of its loop, and `is_running`;
`VllmConfig.shutdown_timeout`.

On SIGTERM such an engine finishes what it has (for `--shutdown-timeout` seconds), but refuses every
call, and ends with its last request. The front end asks for a report when a request has ended, and
without it withholds the answer; so Headway's own calls are let through, and the engine stays until
the reports of its requests were asked for.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from functools import wraps
from typing import Any

from headway.server.engine.text_passes import payload_of

OWN_CALLS = "headway_"
"""How the names of Headway's calls to workers begin."""

POP_REPORT = "headway_pop_report"

WAIT_SECONDS = 5.0
"""How long an engine without work waits for somebody to ask for a report."""

TURN_SECONDS = 0.005

MAX_OWED = 4096
"""Most reports that are remembered; nobody asks for those of offline requests."""


class OwedReports:
    """The reports that nobody has asked for yet, the oldest first."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._until: float | None = None

    def add(self, report_id: str) -> None:
        """A steered request has come."""
        self._ids[report_id] = None
        while len(self._ids) > MAX_OWED:
            self._ids.popitem(last=False)

    def paid(self, report_id: str) -> None:
        """Somebody has asked for its report."""
        self._ids.pop(report_id, None)

    def wait(self, now: float) -> bool:
        """Whether an engine without any work is to wait for somebody who asks."""
        if not self._ids:
            return False
        if self._until is None:
            self._until = now + WAIT_SECONDS
        return now < self._until


def own_call(method: str, args: Any) -> tuple[str, tuple[Any, ...]] | None:
    """The call to workers, name and arguments, that a utility of the engine is; None if not ours.

    args: those of `EngineCore.collective_rpc`.
    """
    if method != "collective_rpc" or not args or not str(args[0]).startswith(OWN_CALLS):
        return None
    return args[0], tuple(args[2]) if len(args) > 2 else ()


def install() -> None:
    """Wrap the methods of vLLM's engine process; calling it again changes nothing."""
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCoreProc

    handle, reject = (
        EngineCoreProc._handle_client_request,
        EngineCoreProc._reject_utility_in_shutdown,
    )
    has_work = EngineCoreProc.has_work
    if hasattr(handle, "__wrapped__"):
        return

    @wraps(handle)
    def _handle_client_request(self: Any, request_type: Any, request: Any) -> None:
        self.headway_call = None
        if request_type == EngineCoreRequestType.ADD:
            payload = payload_of(request[0])
            if payload is not None:
                _owed(self).add(payload["report_id"])
        elif request_type == EngineCoreRequestType.UTILITY:
            self.headway_call = own_call(request[2], request[3])
        handle(self, request_type, request)
        if self.headway_call is not None and self.headway_call[0] == POP_REPORT:
            _owed(self).paid(*self.headway_call[1][:1])

    @wraps(reject)
    def _reject_utility_in_shutdown(self: Any, *args: Any) -> bool:
        return self.headway_call is None and reject(self, *args)

    @wraps(has_work)
    def has_work_or_owes(self: Any) -> bool:
        if has_work(self):
            return True
        if self.is_running() or not self.vllm_config.shutdown_timeout:
            return False
        if not _owed(self).wait(time.monotonic()):
            return False
        time.sleep(TURN_SECONDS)  # nothing else would hold the loop up
        return True

    EngineCoreProc._handle_client_request = _handle_client_request
    EngineCoreProc._reject_utility_in_shutdown = _reject_utility_in_shutdown
    EngineCoreProc.has_work = has_work_or_owes


def _owed(core: Any) -> OwedReports:
    owed: OwedReports = core.__dict__.setdefault("headway_owed", OwedReports())
    return owed
