"""How profiles, their versions and artefacts are named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError

from headway.steering import Reason, SteeringError
from headway.steering.schema import PresetName

DIGEST_PREFIX = "sha256:"

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
"""Names an artefact by its content."""

_NAME: TypeAdapter[str] = TypeAdapter(PresetName)
_DIGEST: TypeAdapter[str] = TypeAdapter(Digest)
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Reference:
    """A profile by name; version: None for the newest."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def is_name(text: str) -> bool:
    """Whether this may name a profile or a preset; such names are safe as names of files."""
    try:
        _NAME.validate_python(text)
    except ValidationError:
        return False
    return True


def is_version(text: str) -> bool:
    """Whether this is the number of a version."""
    return _VERSION.fullmatch(text) is not None


def check_name(text: str, param: str) -> str:
    """The name. Raises SteeringError(E_BAD_PARAM) for one that may name nothing."""
    if not is_name(text):
        allowed = "letters, digits, '.', '_' and '-', 64 at most, the first a letter or a digit"
        message = f"{text[:80]!r} is no name; a name is made of {allowed}"
        raise SteeringError(Reason.BAD_PARAM, message, param)
    return text


def parse_reference(text: str) -> Reference | None:
    """The reference `name` or `name@version`; None if it is neither."""
    name, at, version = text.partition("@")
    if not is_name(name) or (at and not is_version(version)):
        return None
    return Reference(name, int(version) if at else None)


def check_reference(text: str, param: str) -> Reference:
    """The reference. Raises SteeringError(E_BAD_PARAM) for what is none."""
    name, at, version = text.partition("@")
    check_name(name, param)
    if at and not is_version(version):
        message = f"{version[:80]!r} is no version; versions are 1, 2, 3, ..."
        raise SteeringError(Reason.BAD_PARAM, message, param)
    return Reference(name, int(version) if at else None)


def parse_digest(text: str) -> str | None:
    """The 64 hex digits of `sha256:...`; None if it is no such digest."""
    try:
        return _DIGEST.validate_python(text).removeprefix(DIGEST_PREFIX)
    except ValidationError:
        return None


def check_digest(text: str, param: str) -> str:
    """The 64 hex digits of `sha256:...`. Raises SteeringError(E_BAD_PARAM) for what is none."""
    digest = parse_digest(text)
    if digest is None:
        message = f"{text[:80]!r} is no digest; a digest is sha256: and 64 lower-case hex digits"
        raise SteeringError(Reason.BAD_PARAM, message, param)
    return digest
