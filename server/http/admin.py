"""Who may change the registry: admin keys, separate from the API keys of vLLM.

Where vLLM has an API key too, its guard takes the Authorization header; the admin key then stands
in a header of its own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping

from fastapi import Request

from headway.steering import Reason, SteeringError

KEY_OPTION = "--steering-api-key"
KEY_VARIABLE = "HEADWAY_STEERING_API_KEY"
"""Environment variable: keys, separated by commas."""

KEY_HEADER = "X-Steering-Api-Key"


class AdminKeys:
    """The keys that may change the registry; false if there is none. Holds their hashes only."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = tuple(_hash(key.encode()) for key in keys)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> AdminKeys:
        """The keys in the environment."""
        given = environment.get(KEY_VARIABLE, "").split(",")
        return cls(key.strip() for key in given if key.strip())

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise SteeringError unless a header holds a key.

        E_FORBIDDEN where there is no key that could be right, else E_UNAUTHORIZED.
        """
        if not self:
            message = f"this server was started without {KEY_OPTION}; its registry is read-only"
            raise SteeringError(Reason.FORBIDDEN, message, KEY_HEADER)
        if not any([self._knows(key) for key in _keys(headers)]):
            message = f"needs a key of {KEY_OPTION}, as Authorization: Bearer or in {KEY_HEADER}"
            raise SteeringError(Reason.UNAUTHORIZED, message, KEY_HEADER)

    def _knows(self, key: bytes) -> bool:
        found = _hash(key)
        # All are compared, so that the time tells nothing.
        return any([secrets.compare_digest(found, known) for known in self._hashes])


def check_keys(keys: Iterable[str]) -> list[str]:
    """The keys. Raises ValueError for one that could not be sent, or read from the variable."""
    checked = list(keys)
    for key in checked:
        if not key or "," in key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{KEY_OPTION}: a key is made of printable ASCII without ',' and ' '")
    return checked


def require_admin(raw_request: Request) -> None:
    """A dependency of routes: raises SteeringError as `AdminKeys.check` does."""
    raw_request.app.state.headway.registry.keys.check(raw_request.headers)


def _keys(headers: Mapping[str, str]) -> list[bytes]:
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    keys = [bearer.strip()] if scheme.lower() == "bearer" else []
    if KEY_HEADER in headers:
        keys.append(headers[KEY_HEADER])
    return [key.encode("latin-1") for key in keys]


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
