"""What a version of a profile is on disk: a document that never changes.

    {"artifact": "sha256:<hex>", "description": "...", "created": "2026-01-31T12:00:00+00:00"}

for a vector profile, whose tensors are the artefact; `"profile": {...}` in the place of `artifact`
for one that is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError, safe_open

from headway.server.registry.names import Digest, Reference, check_digest
from headway.steering import ModelGeometry, Reason, SteeringError
from headway.steering.profiles import MAX_PROFILE_BYTES, Profile
from headway.steering.validation import StrictModel, validate
from headway.steering.vectors import METADATA_KEY, VectorHeader

START_ONLY_KINDS = ("sinks",)
"""Kinds of profiles that a server takes at its start only."""


class ProfileContent(StrictModel):
    """What a client puts: exactly one of `artifact` and `profile`."""

    artifact: Digest | None = None
    profile: dict[str, Any] | None = None
    description: Annotated[str, Field(max_length=1024)] | None = None

    @property
    def digest(self) -> str | None:
        """SHA-256 (hex) of the artefact, if it names one."""
        return None if self.artifact is None else check_digest(self.artifact, "artifact")

    @classmethod
    def parse(cls, value: Any, param: str) -> ProfileContent:
        """Validate a JSON value. Raises SteeringError(E_BAD_PARAM or E_TOO_LARGE)."""
        content = validate(cls, value, param, MAX_PROFILE_BYTES)
        if (content.artifact is None) == (content.profile is None):
            message = "give exactly one of `artifact` and `profile`"
            raise SteeringError(Reason.BAD_PARAM, message, param)
        return content

    def header(self, find: Callable[[str], Path | None], param: str) -> Profile:
        """What the profile says about itself: the header of its artefact, or all of it.

        find: the file of an artefact. Raises SteeringError: E_BAD_PARAM, also for an artefact that
        is missing; E_UNSUPPORTED for a kind that is given at the start of a server only.
        """
        if self.digest is not None:
            where = f"{param}.artifact"
            path = find(self.digest)
            if path is None:
                message = f"there is no artefact {self.artifact}; put it first"
                raise SteeringError(Reason.BAD_PARAM, message, where)
            return read_header(path, where)
        assert self.profile is not None
        if self.profile.get("kind") in START_ONLY_KINDS:
            message = f"a profile of the kind {self.profile['kind']} goes to --steering-profile"
            raise SteeringError(Reason.UNSUPPORTED, message, f"{param}.profile.kind")
        from headway.server.engine.geometry import parse_profile  # torch comes with it

        return parse_profile(self.profile, f"{param}.profile")


class ProfileDocument(ProfileContent):
    """The same as it is kept; created: when, in UTC."""

    created: str

    @classmethod
    def of(cls, content: ProfileContent) -> ProfileDocument:
        """A document of now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(**content.model_dump(), created=now)

    @property
    def content(self) -> ProfileContent:
        """What the client put."""
        return ProfileContent(**self.model_dump(exclude={"created"}))

    def encode(self) -> bytes:
        """The file."""
        return self.model_dump_json(indent=1, exclude_none=True).encode() + b"\n"


@dataclass(frozen=True)
class Record:
    """A version of a profile without its tensors."""

    name: str
    number: int
    document: ProfileDocument
    header: Profile

    @property
    def reference(self) -> str:
        """Names this version and no other."""
        return str(Reference(self.name, self.number))


def fits(header: Profile, geometry: ModelGeometry) -> bool:
    """Whether a profile was made for a model of these sizes."""
    try:
        header.check_model(geometry)
    except SteeringError:
        return False
    return True


def read_header(path: Path, param: str) -> VectorHeader:
    """The header of a vector profile, without its tensors. Raises SteeringError(E_BAD_PARAM)."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "null")
        return VectorHeader.parse(json.loads(text), param)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        if isinstance(error, SteeringError):
            raise
        message = f"cannot be read as a vector profile: {error}"
        raise SteeringError(Reason.BAD_PARAM, message, param) from None
