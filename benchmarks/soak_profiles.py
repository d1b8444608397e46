"""The profiles and presets that `headway bench soak` puts on a server over HTTP."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from headway.benchmarks.serve_matrix import drawn_profile
from headway.benchmarks.soak_asks import STEERING_ROUTES, Ask, Expected
from headway.steering import ModelGeometry
from headway.steering.vectors import FeedbackRule, VectorHeader, VectorProfile

PROFILES = {kind: f"soak-{kind}" for kind in ("gact", "caa", "act")}
"""Method -> the name of the profile that all requests with it share."""
PRESETS: dict[str, list[dict[str, Any]]] = {
    "soak-heads": [{"method": "vhr", "heads": [[0, 0], [1, 0]], "alpha": 1.5}],
    "soak-window": [{"method": "locore", "beta": 0.3}],
    "soak-vectors": [{"method": "gact", "profile": PROFILES["gact"]}],
}
NUM_LAYERS = 2
SETUP = "setup"


def drawn(geometry: ModelGeometry, kind: str, seed: int) -> VectorProfile:
    """A small profile with drawn vectors, so weak that what is generated stays text."""
    if kind == "gact":
        made = drawn_profile(geometry, seed, NUM_LAYERS)
        # Its probes are read, so that feedback is possible.
        header = made.header.model_copy(update={"feedback": FeedbackRule()})
        return VectorProfile(header, made.tensors)
    draw = np.random.default_rng(seed)
    last = geometry.num_layers - 1
    if kind == "act":
        heads = ((last // 2, 0), (last, 0))
        shape: tuple[int, ...] = len(heads), geometry.head_size
        shifts = (0.1 * draw.standard_normal(shape)).astype(np.float32)
        header = VectorHeader.of(geometry, kind="act", heads=heads)
        return VectorProfile(header, {"shifts": shifts})
    layers = last // 3, 2 * last // 3
    shape = len(layers), 1, geometry.hidden_size
    directions = (0.1 * draw.standard_normal(shape)).astype(np.float32)
    header = VectorHeader.of(geometry, kind="caa", layers=layers)
    return VectorProfile(header, {"directions": directions})


@lru_cache(maxsize=16)
def artifact(geometry: ModelGeometry, kind: str, seed: int) -> tuple[str, bytes]:
    """The digest (hex) and the bytes of a drawn profile."""
    with tempfile.TemporaryDirectory(prefix="headway-soak-") as folder:
        path = Path(folder, "profile.safetensors")
        digest = drawn(geometry, kind, seed).save(path)
        return digest, path.read_bytes()


def put_shared(geometry: ModelGeometry) -> list[Ask]:
    """The uploads of all that requests share, in the order in which they must be made."""
    asks = []
    for kind, name in PROFILES.items():
        digest, content = artifact(geometry, kind, 0)
        where = f"{STEERING_ROUTES}/artifacts/sha256:{digest}"
        asks.append(_admin("PUT", where, content=content))
        body = {"artifact": f"sha256:{digest}", "description": "Drawn for a soak."}
        asks.append(_admin("PUT", f"{STEERING_ROUTES}/profiles/{name}", body=body))
    for name, methods in PRESETS.items():
        where = f"{STEERING_ROUTES}/presets/{name}"
        asks.append(_admin("PUT", where, body={"methods": methods}))
    return asks


def delete_shared() -> list[Ask]:
    """Undoes `put_shared`."""
    presets = [f"{STEERING_ROUTES}/presets/{name}" for name in PRESETS]
    profiles = [f"{STEERING_ROUTES}/profiles/{name}" for name in PROFILES.values()]
    return [_admin("DELETE", where) for where in presets + profiles]


def _admin(verb: str, path: str, **what: Any) -> Ask:
    statuses = (200, 201) if verb == "PUT" else (200,)
    return Ask(SETUP, path, verb=verb, admin=True, expected=Expected(statuses), **what)
