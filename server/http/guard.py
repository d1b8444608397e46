"""Middleware that refuses steering where it would be ignored.

vLLM's request models allow unknown keys, so any of its other endpoints would answer a body with
`steering` as if it were not there.
"""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headway.server.http.carriage import Carriage, split_alias, take_carriages
from headway.server.http.errors import refuse_early
from headway.steering import Reason, SteeringError

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Most of a body that is looked at; what follows is passed on as it comes."""

OWN_PREFIX = "/v1/steering/"


class SteeringGuard:
    """Answers 400 to a POST of JSON that asks for steering on an endpoint that cannot steer.

    steerable: the paths that judge the field themselves. Pure ASGI: the body is read once, looked
    at, and replayed; every other request passes untouched.
    """

    def __init__(self, app: ASGIApp, steerable: Container[str]) -> None:
        self.app = app
        self.steerable = steerable

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or not self._guards(scope):
            await self.app(scope, receive, send)
            return
        messages, body, whole = await _read(receive)
        carriage = find_steering(body, whole)
        state = state_of(scope)
        if carriage is None and state is not None and state.any_model:
            carriage = await state.in_thread(find_alias, body, state)
        if carriage is not None:
            message = f"{path_of(scope)} cannot steer; it would have ignored this"
            error = SteeringError(Reason.UNSUPPORTED, message, carriage.param)
            await refuse_early(error, scope, receive, send)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)

    def _guards(self, scope: Scope) -> bool:
        path = path_of(scope)
        if path.rstrip("/") in self.steerable or path.startswith(OWN_PREFIX):
            return False
        content_type = Headers(scope=scope).get("content-type", "")
        return not content_type or "json" in content_type.lower()


def find_steering(body: bytes, whole: bool = True) -> Carriage | None:
    """Where a JSON body asks for steering, None if it does not (or is no JSON object).

    whole: False if `body` is only the start of one, which is then searched for the key as text.
    """
    # A key can be spelt with escapes, and a body in UTF-16 or UTF-32, which JSON's parser takes;
    # only then, or with the word itself, is parsing worth it.
    if b"steering" not in body and b"\\u00" not in body and b"\0" not in body[:4]:
        return None
    if not whole:
        text = body.decode(json.detect_encoding(body), "replace")
        return Carriage(None, "steering") if '"steering"' in text else None
    carriages = take_carriages(_parse(body))[0]
    return carriages[0] if carriages else None


def find_alias(body: bytes, state: Any) -> Carriage | None:
    """The alias of a preset that a JSON body names as its model, None if it does not.

    For servers that take every name for their model: others answer that there is no such model.
    """
    model = _parse(body).get("model")
    if not isinstance(model, str):
        return None
    alias = split_alias(model, state.presets, state.is_served, state.any_model)
    return None if alias is None else alias[1]


def _parse(body: bytes) -> dict[str, Any]:
    """A JSON object, an empty one in place of anything else."""
    try:
        parsed: Any = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


async def _read(receive: Receive) -> tuple[list[Message], bytes, bool]:
    """The messages of a request's body, the body, and whether that is all of it."""
    messages: list[Message] = []
    chunks: list[bytes] = []
    size = 0
    while size <= MAX_BODY_BYTES:
        message = await receive()
        messages.append(message)
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, b"".join(chunks), True
    return messages, b"".join(chunks), False


def state_of(scope: Scope) -> Any:
    """The `SteeringState` of the app, None before there is one."""
    return getattr(scope["app"].state, "headway", None)


def path_of(scope: Scope) -> str:
    """The path of a request, without that under which the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
