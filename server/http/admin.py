"""Who may change the registry: admin keys, separate from the API keys of vLLM.

Where vLLM has an API key too, its guard takes the Authorization header; the admin key then stands
in a header of its own. Keys in a file may change while the server runs, as a mounted Secret does.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastapi import Request

from headway.steering import Reason, SteeringError

KEY_OPTION = "--steering-api-key"
KEY_VARIABLE = "HEADWAY_STEERING_API_KEY"
"""Environment variable: keys, separated by commas."""

FILE_OPTION = "--steering-api-key-file"
FILE_VARIABLE = "HEADWAY_STEERING_API_KEY_FILE"
"""Environment variable: the path of a file of keys."""

KEY_HEADER = "X-Steering-Api-Key"

logger = logging.getLogger(__name__)


class KeyFile:
    """Keys in a file, a line or between commas each. Holds their hashes only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[tuple[int, ...], tuple[bytes, ...]] | None = None

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """Those of the keys that the file holds now; none where it cannot be read.

        It is read when it has changed since, or another file has taken its place.
        """
        try:
            found = self._path.stat()  # of the file that a link points to: a Secret's is swapped
            stamp = found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
            if self._read is None or self._read[0] != stamp:
                keys = keys_in(self._path)
                self._read = stamp, tuple(_hash(key.encode()) for key in keys)
                logger.info("read %d admin keys from %s", len(keys), self._path)
        except (OSError, ValueError) as error:
            # Rather no key than one that may have been withdrawn.
            logger.error("%s %s: no key of it is taken: %s", FILE_OPTION, self._path, error)
            return ()
        return self._read[1]


class AdminKeys:
    """The keys that may change the registry; false if there is none. Holds their hashes only."""

    def __init__(self, keys: Iterable[str] = (), file: KeyFile | None = None) -> None:
        self._fixed = tuple(_hash(key.encode()) for key in keys)
        self._file = file

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> AdminKeys:
        """The keys in the environment, and in the file that it names."""
        path = environment.get(FILE_VARIABLE)
        file = KeyFile(Path(path)) if path else None
        return cls(split_keys(environment.get(KEY_VARIABLE, "")), file)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    @property
    def _hashes(self) -> tuple[bytes, ...]:
        return self._fixed + (self._file.hashes if self._file is not None else ())

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise SteeringError unless a header holds a key.

        E_FORBIDDEN where there is no key that could be right, else E_UNAUTHORIZED.
        """
        hashes = self._hashes
        if not hashes:
            message = f"this server has no key of {KEY_OPTION}; its registry is read-only"
            raise SteeringError(Reason.FORBIDDEN, message, KEY_HEADER)
        # All are compared, so that the time tells nothing.
        found = [_hash(key) for key in _keys(headers)]
        if not any([secrets.compare_digest(key, known) for key in found for known in hashes]):
            message = f"needs a key of {KEY_OPTION}, as Authorization: Bearer or in {KEY_HEADER}"
            raise SteeringError(Reason.UNAUTHORIZED, message, KEY_HEADER)


def check_keys(keys: Iterable[str], option: str = KEY_OPTION) -> list[str]:
    """The keys. Raises ValueError for one that could not be sent, or read from the variable."""
    checked = list(keys)
    for key in checked:
        if not key or "," in key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{option}: a key is made of printable ASCII without ',' and ' '")
    return checked


def keys_in(path: Path) -> list[str]:
    """The keys of a file. Raises OSError, and ValueError for a key that could not be sent."""
    lines = path.read_bytes().decode("latin-1").splitlines()  # which none but ASCII will pass
    return check_keys([key for line in lines for key in split_keys(line)], FILE_OPTION)


def split_keys(text: str) -> list[str]:
    """Keys between commas."""
    return [key.strip() for key in text.split(",") if key.strip()]


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
