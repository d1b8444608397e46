"""The end of a server: what comes after SIGTERM, or after the death of its engine, is refused.

vLLM symbols relied on: `serve_http`, which calls `engine_client.shutdown` on SIGTERM and goes on
accepting connections until the engine has ended what it has, and which keeps its uvicorn server in
`app.state.server`; `build_async_engine_client_from_engine_args`, which calls it in any case when
the server has ended; `AsyncLLM.errored`. vLLM itself would answer a request of that time with 200
and no text, finished by "abort".
"""

from __future__ import annotations

import asyncio
from functools import wraps
from typing import Any

from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from headway.server.http.errors import error_response
from headway.server.http.guard import path_of, state_of
from headway.server.http.metrics import REFUSED
from headway.steering import Reason, SteeringError

READINESS = ("/v1/models", "/v1/steering/capabilities")
"""What tells whether a server takes requests; `/health` goes on telling that it lives."""

READING = ("GET", "HEAD", "OPTIONS")

EXIT_SECONDS = 10
"""How long connections may take for what is left to send when everything else has ended: a client
that does not read would hold up the end for ever."""


class Lifetime:
    """Whether this server still takes requests. engine_client: vLLM's; None for a dry run.

    engine_died: whether the engine was gone already when vLLM shut it down.
    """

    def __init__(self, engine_client: Any = None) -> None:
        self._engine = engine_client
        self._is_draining = False
        self.engine_died = False

    @property
    def ending(self) -> str | None:
        """Why no more requests are taken; None while they are."""
        if self._is_draining:
            return "the server is shutting down"
        if self._engine is not None and self._engine.errored:
            return "the engine of this server has died"
        return None

    def watch(self) -> None:
        """Notice when vLLM begins to shut the engine down."""
        shutdown = self._engine.shutdown

        @wraps(shutdown)
        def noticed(*args: Any, **kwargs: Any) -> Any:
            if not self._is_draining:  # vLLM does it once more in the end
                self._is_draining = True
                self.engine_died = self._engine.errored
            return shutdown(*args, **kwargs)

        self._engine.shutdown = noticed

    def refusal(self) -> SteeringError:
        """What a request is answered that comes too late, or is cut off by the end."""
        message = f"{self.ending}; send the request again"
        return SteeringError(Reason.UNAVAILABLE, message, "server")


async def bound_exit(state: State) -> None:
    """Limit how long the server waits for connections in the end, once there is a server."""
    while not hasattr(state, "server"):
        await asyncio.sleep(0.1)
    config = state.server.config
    if config.timeout_graceful_shutdown is None:
        config.timeout_graceful_shutdown = EXIT_SECONDS


class RefusesLateRequests:
    """Middleware: 503 for requests that come too late, and for whoever asks whether to send any.

    Past reports and metrics can still be read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        state = state_of(scope) if scope["type"] == "http" else None
        if state is None or state.lifetime.ending is None or not _is_late(scope):
            await self.app(scope, receive, send)
            return
        error = state.lifetime.refusal()
        REFUSED.labels(reason=str(error.reason)).inc()
        await error_response(error)(scope, receive, send)


def _is_late(scope: Scope) -> bool:
    return scope["method"] not in READING or path_of(scope).rstrip("/") in READINESS
