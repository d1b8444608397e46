"""Profiles for the tests of the registry: small vectors and heads, and how they get into one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.server.registry.store import Store
from headway.steering import ModelGeometry, SteeringError
from headway.steering.heads import HeadProfile
from headway.steering.vectors import VectorHeader, VectorProfile

GEOMETRY = ModelGeometry(4, 4, 2, 16, 64, architecture="Llama")
OTHER_MODEL = ModelGeometry(5, 4, 2, 16, 64, architecture="Llama")


def vectors(seed: int = 0, geometry: ModelGeometry = GEOMETRY, **header: Any) -> VectorProfile:
    """A profile of the kind caa for two layers; another seed is another profile."""
    facts = {"kind": "caa", "layers": (1, 3), "licence": "MIT", **header}
    of_model = {
        "version": 1,
        "fingerprint": geometry.fingerprint,
        "architecture": geometry.architecture,
        "hidden_size": geometry.hidden_size,
        "num_layers": geometry.num_layers,
    }
    draw = np.random.default_rng(seed)
    directions = draw.standard_normal((2, 1, geometry.hidden_size)).astype(np.float32)
    return VectorProfile(VectorHeader(**of_model, **facts), {"directions": directions})


def vector_bytes(folder: Path, seed: int = 0, **facts: Any) -> bytes:
    """The file of `vectors`."""
    path = folder / "vectors.safetensors"
    vectors(seed, **facts).save(path)
    return path.read_bytes()


def digest_of(content: bytes) -> str:
    """SHA-256 (hex)."""
    return hashlib.sha256(content).hexdigest()


def heads(geometry: ModelGeometry = GEOMETRY, alpha: float = 2.0) -> dict[str, Any]:
    """The JSON of a profile of the kind heads."""
    profile = HeadProfile.of(
        geometry,
        num_heads=geometry.num_heads,
        heads=((0, 3), (2, 1)),
        layers=(0, 2),
        alpha=alpha,
        num_images=5,
        questions=("Is there a fork in the image?",),
        vhd=((1.0,) * geometry.num_heads,) * geometry.num_layers,
    )
    return profile.model_dump(mode="json")


def put_bytes(
    store: Store, content: bytes, digest: str = "", geometry: ModelGeometry = GEOMETRY
) -> str:
    """Put an artefact; returns its digest (hex), unless another is asserted."""
    digest = digest or digest_of(content)
    upload = store.upload()
    try:
        upload.write(content)
        store.put_artifact(digest, upload, geometry)
    finally:
        upload.discard()
    return digest


def put_vectors(store: Store, folder: Path, name: str, seed: int = 0) -> str:
    """Put an artefact and the next version of a profile that refers to it; returns the digest."""
    digest = put_bytes(store, vector_bytes(folder, seed))
    store.put_profile(name, {"artifact": f"sha256:{digest}"}, GEOMETRY)
    return digest


def put_heads(store: Store, name: str = "p", **content: Any) -> tuple[int, bool]:
    """Put the next version of a profile of the kind heads."""
    return store.put_profile(name, {"profile": heads(), **content}, GEOMETRY)


def refused(reason: str, words: str | None = None) -> Any:
    """Expects a SteeringError of a reason."""
    return pytest.raises(SteeringError, match=words, check=lambda error: error.reason == reason)
