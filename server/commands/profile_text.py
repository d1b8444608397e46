"""What `headway profile show` prints of a profile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from headway.steering.profiles import AnyProfile, Profile
from headway.steering.vectors import VectorProfile

WIDTH = 100
"""How many characters of JSON a value may take; a longer one is described by its sizes."""


def layer_words(layers: Sequence[int]) -> str:
    """Layers, ascending, on little space: `1 .. 29`, `3, 7, 9`."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} .. {layers[-1]}"
    return ", ".join(map(str, layers))


def describe(profile: AnyProfile, digest: str) -> str:
    """Header, shapes and norms of a profile, a fact a line; digest: SHA-256 (hex) of its file."""
    lines = [f"digest: sha256:{digest}"]
    if isinstance(profile, VectorProfile):
        lines += _facts(profile.header)
        lines += [f"{name}: {_shape(array)}" for name, array in sorted(profile.tensors.items())]
        lines += ["", *_norms(profile)]
    elif isinstance(profile, Profile):
        lines += _facts(profile)
    return "\n".join(lines)


def _facts(header: Profile) -> Iterator[str]:
    """A line for each field that says something; those of a nested object after a dot."""
    for name, value in header.model_dump(mode="json").items():
        if name == "layers" and value:
            yield f"layers: {layer_words(value)}"
            continue
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, each in inner:
            if each not in (None, "", [], {}):
                yield f"{name}.{key}: {_words(each)}" if key else f"{name}: {_words(each)}"


def _words(value: Any) -> str:
    # As JSON, which escapes what could move the cursor of a terminal.
    text = json.dumps(value)
    if isinstance(value, str):
        return text[1:-1]
    return text if len(text) <= WIDTH or not isinstance(value, list) else _sizes(value)


def _sizes(value: list[Any]) -> str:
    """The sizes of nested lists: `30 x 9 values`."""
    sizes: list[int] = []
    level: Any = value
    while isinstance(level, list) and level:
        sizes.append(len(level))
        level = level[0]
    return " x ".join(map(str, sizes)) + " values"


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _norms(profile: VectorProfile) -> Iterator[str]:
    """A table of Euclidean norms: of each direction of a layer, of the shift of a head."""
    if profile.kind == "act":
        yield "norms of the shifts"
        yield f"{'layer':>6}{'head':>6}  norm"
        norms = np.linalg.norm(profile.tensors["shifts"], axis=-1)
        for (layer, head), norm in zip(profile.header.heads, norms, strict=True):
            yield f"{layer:>6}{head:>6}  {norm:.4g}"
        return
    yield "norms of the directions"
    yield f"{'layer':>6}  norm"
    norms = np.linalg.norm(profile.tensors["directions"], axis=-1)
    for layer, row in zip(profile.header.layers, norms, strict=True):
        yield f"{layer:>6}  {'  '.join(f'{norm:.4g}' for norm in row)}"
