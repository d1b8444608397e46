"""What clients see of the profiles of a server."""

from __future__ import annotations

from typing import Any

from headway.server.registry.documents import Record, fits
from headway.server.registry.names import Reference, check_reference
from headway.server.registry.registry import Registry
from headway.server.registry.view import digest_of
from headway.steering import ModelGeometry, Reason, SteeringError
from headway.steering.profiles import AnyProfile, Profile
from headway.steering.vectors import VectorProfile

START = "start"
REGISTRY = "registry"
"""Where a profile is from: given at the start of the server, or put by a client."""


def list_profiles(registry: Registry) -> list[dict[str, Any]]:
    """The newest version of every profile, by name; one that cannot be read says why."""
    given = registry.profiles.given.profiles
    names = sorted({*given, *registry.store.names()})
    return [shown for shown in (_summary(registry, name) for name in names) if shown is not None]


def show_profile(registry: Registry, text: str) -> dict[str, Any]:
    """A profile by name or `name@version`. Raises SteeringError(E_PROFILE_NOT_FOUND)."""
    asked = check_reference(text, "name")
    given = registry.profiles.given.profiles.get(asked.name)
    if given is not None and asked.version is None:
        return {**_given(asked.name, given), "versions": [], "header": _facts(header_of(given))}
    record = registry.profiles.record(text)
    if record is None:
        known = ", ".join(registry.profiles.names()) or "none"
        message = f"there is no profile {text}; the profiles are: {known}"
        raise SteeringError(Reason.PROFILE_NOT_FOUND, message, "name")
    return {
        **_stored(record, registry.geometry),
        "versions": list(registry.store.versions(asked.name)),
        "header": _facts(record.header),
    }


def header_of(profile: AnyProfile) -> Profile | None:
    """What a profile says about itself."""
    if isinstance(profile, VectorProfile):
        return profile.header
    return profile if isinstance(profile, Profile) else None


def _summary(registry: Registry, name: str) -> dict[str, Any] | None:
    given = registry.profiles.given.profiles.get(name)
    if given is not None:
        return _given(name, given)
    try:
        record = registry.profiles.record(name)
    except SteeringError as error:
        return {"name": name, "from": REGISTRY, "fits": False, "error": str(error)}
    return None if record is None else _stored(record, registry.geometry)


def _given(name: str, profile: AnyProfile) -> dict[str, Any]:
    header = header_of(profile)
    return {
        "name": name,
        "version": None,
        "reference": name,
        "from": START,
        "kind": profile.kind,
        "artifact": digest_of(profile),
        "layers": layers_of(header),
        "fits": True,
        "description": None,
        "created": None,
    }


def _stored(record: Record, geometry: ModelGeometry) -> dict[str, Any]:
    return {
        "name": record.name,
        "version": record.number,
        "reference": str(Reference(record.name, record.number)),
        "from": REGISTRY,
        "kind": record.header.kind,
        "artifact": record.document.artifact,
        "layers": layers_of(record.header),
        "fits": fits(record.header, geometry),
        "description": record.document.description,
        "created": record.document.created,
    }


def layers_of(header: Profile | None) -> list[int]:
    """The layers that a profile is about, ascending; of heads, their layers."""
    of_heads = (layer for layer, _ in getattr(header, "heads", ()))
    return sorted({*getattr(header, "layers", ()), *of_heads})


def _facts(header: Profile | None) -> dict[str, Any]:
    return {} if header is None else header.model_dump(mode="json")
