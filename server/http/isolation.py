"""A prefix cache for each client: nobody learns from the speed of an answer what others asked.

vLLM symbols relied on: `AsyncLLM.engine_core.add_request_async`, through which every request of
every endpoint goes to the engine, in the task that serves it or in one begun there;
`EngineCoreRequest.cache_salt`, which enters the key of a request's first block and, by chaining,
those of all later ones.

The salt is made from the client, the salt that it gave and a secret, so that nobody can give that
of another, and nobody who sees salts (a cache outside of the server, its events) can try out keys.
It changes which blocks are reused, never an answer.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
from argparse import Namespace
from collections.abc import MutableMapping
from functools import wraps
from typing import Any

from headway.server.http.clients import CLIENT, api_keys

OPTION = "--isolate-tenants"

SECRET_VARIABLE = "HEADWAY_TENANT_SECRET"
"""Environment variable: what salts are made with. Servers that share a cache need the same one."""


def check_isolation(args: Namespace, environment: MutableMapping[str, str]) -> None:
    """Make a secret, for all processes of the server, where there is none.

    Raises ValueError where clients cannot be told apart, or could read each other's answers.
    """
    keys = api_keys(args)
    if not args.isolate_tenants:
        if len(keys) > 1:
            message = f"the clients of {len(keys)} API keys share a prefix cache"
            print(f"headway serve: {message}; {OPTION} keeps them apart", file=sys.stderr)
        return
    from vllm import envs

    if not keys:
        raise ValueError(f"{OPTION} tells clients apart by their API keys; give --api-key")
    if envs.VLLM_ENABLE_RESPONSES_API_STORE:
        message = "with VLLM_ENABLE_RESPONSES_API_STORE every client can read every response"
        raise ValueError(f"{OPTION}: {message}; unset it")
    if not environment.get(SECRET_VARIABLE):
        environment[SECRET_VARIABLE] = secrets.token_hex(32)


def isolate(engine_client: Any, secret: str) -> None:
    """Salt every request that this client of the engine (vLLM's AsyncLLM) sends from now on."""
    core = engine_client.engine_core
    add = core.add_request_async

    @wraps(add)
    async def add_salted(request: Any) -> Any:
        request.cache_salt = salt_of(secret, CLIENT.get(), request.cache_salt)
        return await add(request)

    core.add_request_async = add_salted


def salt_of(secret: str, client: str | None, salt: str | None) -> str:
    """64 hex digits, for a client and the salt that it gave.

    client: None where it is not known; such a request shares its blocks with no other.
    """
    if client is None:
        return secrets.token_hex(32)
    text = f"{client}\n{salt or ''}"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()
