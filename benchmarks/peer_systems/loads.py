"""What every system is asked: prompts, and how each request is steered, in words of no system.

    {"method": "head_scale", "scales": [[layer, head, scale], ...]}
    {"method": "locore", "beta": b, "window": w, "layers": [...]}
    {"method": "emphasis", "alpha": a, "span": [start, end]}         tokens of the prompt
    {"method": "caa", "layer": l, "vector": [...], "strength": s}    at all positions
    {"method": "sgrs", "alpha": a}

"options" beside these are passed on as they are: options that no system has must be refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

HEAD_SCALE, LOCORE, EMPHASIS, CAA, SGRS = "head_scale", "locore", "emphasis", "caa", "sgrs"
METHODS = (HEAD_SCALE, LOCORE, EMPHASIS, CAA, SGRS)
FROM_THE_SECOND_TOKEN = frozenset({LOCORE, SGRS})
"""Methods that by their definition leave the first output token as it is: LocoRE steers queries at
output positions, SGRS has no history to judge it by."""
ALPHA = 1.5
SPAN_TOKENS = 32
NO_LAYER, NO_OPTION = 10_000, "no_such_option"


@dataclass(frozen=True)
class Sizes:
    """Of a model: layers, query heads, and values of the residual stream."""

    num_layers: int
    num_heads: int
    hidden_size: int


def _head_scale(sizes: Sizes, index: int) -> dict[str, Any]:
    """As VHR does: 1.5 on half the heads of its default layers, others for each request."""
    scale = sizes.num_layers / 32
    last = sizes.num_layers - 1
    layers = sorted({min(round(layer * scale), last) for layer in (1, *range(18, 32))})
    draw = random.Random(index)
    return {
        "scales": [
            [layer, head, ALPHA]
            for layer in layers
            for head in sorted(draw.sample(range(sizes.num_heads), max(1, sizes.num_heads // 2)))
        ]
    }


def _locore(sizes: Sizes, index: int) -> dict[str, Any]:
    """Its default window and layers, another strength for each request."""
    scale = sizes.num_layers / 32
    layers = list(range(round(9 * scale), round(14 * scale) + 1))
    return {"beta": round(0.15 + 0.01 * index, 4), "window": 8, "layers": layers}


def _emphasis(sizes: Sizes, index: int) -> dict[str, Any]:
    """Its default strength in all heads, another span for each request."""
    start = 8 + 4 * (index % 16)
    return {"alpha": 0.01, "span": [start, start + SPAN_TOKENS]}


def _caa(sizes: Sizes, index: int) -> dict[str, Any]:
    """One drawn direction of length 1 in the middle layer, another strength for each request."""
    vector = np.random.default_rng(0).standard_normal(sizes.hidden_size)
    vector = (vector / np.linalg.norm(vector)).astype(np.float32)
    strength = 4.0 + 0.25 * index
    return {"layer": sizes.num_layers // 2, "vector": vector.tolist(), "strength": strength}


def _sgrs(sizes: Sizes, index: int) -> dict[str, Any]:
    """Its defaults."""
    return {"alpha": 0.6}


BUILD: dict[str, Callable[[Sizes, int], dict[str, Any]]] = {
    HEAD_SCALE: _head_scale,
    LOCORE: _locore,
    EMPHASIS: _emphasis,
    CAA: _caa,
    SGRS: _sgrs,
}


def steering(method: str, sizes: Sizes, index: int) -> dict[str, Any]:
    """How request `index` of a batch is steered."""
    return {"method": method, **BUILD[method](sizes, index)}


def without_strength(steered: dict[str, Any]) -> dict[str, Any]:
    """The same, so weak that it changes nothing."""
    match steered["method"]:
        case "head_scale":
            scales = [[layer, head, 1.0] for layer, head, _ in steered["scales"]]
            return {**steered, "scales": scales}
        case "locore":
            return {**steered, "beta": 0.0}
        case "emphasis":
            return {**steered, "alpha": 1.0}
        case "caa":
            return {**steered, "strength": 0.0}
        case _:
            return {**steered, "alpha": 0.0}


def impossible(steered: dict[str, Any]) -> list[dict[str, Any]]:
    """The same with an option that does not exist, and at a layer that does not."""
    wrong = [{**steered, "options": {NO_OPTION: 1}}]
    match steered["method"]:
        case "head_scale":
            wrong.append({**steered, "scales": [[NO_LAYER, 0, ALPHA]]})
        case "caa":
            wrong.append({**steered, "layer": NO_LAYER})
        case _:
            wrong.append({**steered, "layers": [NO_LAYER]})
    return wrong
