"""Which client sent a request: the API key that it carries, known by a hash.

vLLM symbols relied on: `init_entrypoints_middleware`, which takes the keys of `--api-key`, else
that of VLLM_API_KEY; `AuthenticationMiddleware`, outside of ours, which refuses wrong keys below
its prefixes and lets everybody pass elsewhere.
"""

from __future__ import annotations

import hashlib
import secrets
from argparse import Namespace
from collections.abc import Iterable
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headway.server.http.guard import state_of

ANONYMOUS = "anonymous"
"""All clients that carry none of the keys; everybody, where the server has no keys."""

CLIENT: ContextVar[str | None] = ContextVar("headway_client", default=None)
"""The client of the request that the running task serves; None outside of a request."""


class Clients:
    """The API keys of the server. Holds their hashes only."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = tuple(_hash(key) for key in keys)

    @classmethod
    def of(cls, args: Namespace) -> Clients:
        """Those that vLLM guards this server with."""
        return cls(api_keys(args))

    def identify(self, headers: Headers) -> str:
        """The hash (hex) of the key in these headers if it is one of the server's, or ANONYMOUS."""
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        found = _hash(key) if scheme.lower() == "bearer" else b""
        # All are compared, so that the time tells nothing.
        known = any([secrets.compare_digest(found, each) for each in self._hashes])
        return found.hex() if known else ANONYMOUS


class NamesClients:
    """Middleware: `CLIENT` is set for whatever serves the request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        state = state_of(scope) if scope["type"] in ("http", "websocket") else None
        if state is None:
            await self.app(scope, receive, send)
            return
        token = CLIENT.set(state.clients.identify(Headers(scope=scope)))
        try:
            await self.app(scope, receive, send)
        finally:
            CLIENT.reset(token)


def api_keys(args: Namespace) -> list[str]:
    """The API keys of vLLM's arguments, as vLLM finds them."""
    from vllm import envs

    return [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]


def current_client() -> str:
    """Who sent the request that the running task serves."""
    return CLIENT.get() or ANONYMOUS


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
