"""Middleware that bounds the bodies of the routes that steer, and how long they may take.

Pure ASGI: a body is read once, as it comes, and handed on in one piece. Uploads of artefacts go to
the disk as they come, below a limit of their own; the bodies of vLLM's other routes are vLLM's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headway.server.http.errors import refuse_early
from headway.server.http.guard import OWN_PREFIX, path_of, state_of
from headway.steering import Reason, SteeringError

WITH_BODY = ("POST", "PUT", "PATCH")
UNBOUNDED = f"{OWN_PREFIX}artifacts/"


class BoundsBodies:
    """Answers 413 to a body that is too large and 408 to one that takes too long.

    steerable: paths of steerable routes; those below `OWN_PREFIX` are bounded too.
    """

    def __init__(self, app: ASGIApp, steerable: Container[str]) -> None:
        self.app = app
        self.steerable = steerable

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        state = state_of(scope) if scope["type"] == "http" else None
        if state is None or scope["method"] not in WITH_BODY or not self._bounds(scope):
            await self.app(scope, receive, send)
            return
        limits = state.limits
        try:
            check_declared(scope, limits.body_bytes)
            async with asyncio.timeout(limits.request_body_timeout):
                body = await read(receive, limits.body_bytes)
        except TimeoutError:
            message = f"did not come within {limits.request_body_timeout} seconds"
            error = SteeringError(Reason.TIMEOUT, message, "body")
            await refuse_early(error, scope, receive, send)
            return
        except SteeringError as error:
            await refuse_early(error, scope, receive, send)
            return
        if body is None:
            return  # the client is gone
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _bounds(self, scope: Scope) -> bool:
        path = path_of(scope)
        if path.startswith(UNBOUNDED):
            return False
        return path.rstrip("/") in self.steerable or path.startswith(OWN_PREFIX)


def check_declared(scope: Scope, max_bytes: int) -> None:
    """Raise SteeringError(E_TOO_LARGE) if the length that is announced is too much already."""
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal():
        check_size(int(declared), max_bytes)


def check_size(size: int, max_bytes: int) -> None:
    """Raise SteeringError(E_TOO_LARGE) for more than `max_bytes`."""
    if size > max_bytes:
        message = f"has more than {max_bytes} bytes, the limit of --max-request-body"
        raise SteeringError(Reason.TOO_LARGE, message, "body")


async def read(receive: Receive, max_bytes: int) -> bytes | None:
    """A body; None if the client went away. Raises SteeringError(E_TOO_LARGE)."""
    body = bytearray()  # and no list of pieces, which could be of one byte each
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        check_size(len(body), max_bytes)
        if not message.get("more_body", False):
            return bytes(body)
