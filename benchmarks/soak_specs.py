"""The ways of steering of `headway bench soak`: every method for text, with drawn options."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from headway.benchmarks.soak_profiles import PROFILES
from headway.steering import ModelGeometry

Builder = Callable[[random.Random, ModelGeometry, str], dict[str, Any]]
"""(random choices, model, prompt) -> a method of the `methods` list."""


def _vhr(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    alpha = round(draw.uniform(1.1, 2.5), 3)
    return {"method": "vhr", "heads": _heads(draw, geometry), "alpha": alpha}


def _locore(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    return {
        "method": "locore",
        "beta": round(draw.uniform(0.05, 1.0), 3),
        "window": draw.randint(1, 32),
        "renormalize": draw.random() < 0.5,
        "history": draw.choice(("output", "any")),
    }


def _sgrs(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    top_k = draw.randint(2, 8)
    resample = draw.randint(1, min(3, top_k))
    alpha = round(draw.uniform(0.3, 1.2), 3)
    return {"method": "sgrs", "alpha": alpha, "top_k": top_k, "max_resample": resample}


def _gact(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    cluster = draw.choice(("auto", 0, 1))
    return _vectors(draw, "gact") | {"cluster": cluster}


def _caa(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    return _vectors(draw, "caa") | {"mode": draw.choice(("add", "remove"))}


def _act(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    return _vectors(draw, "act")


def _vectors(draw: random.Random, method: str) -> dict[str, Any]:
    scope = draw.choice(("from_last_prompt_token", "output", "all"))
    strength = round(draw.uniform(0.05, 0.5), 3)
    return {"method": method, "profile": PROFILES[method], "strength": strength, "scope": scope}


def _emphasis(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    words = [word for word in prompt.split() if word.isalpha() and len(word) > 3]
    span: dict[str, Any] = {"text": draw.choice(words)} if words else {"tokens": [0, 1]}
    if draw.random() < 0.3:
        span = {"tokens": [0, draw.randint(1, 4)]}
    return {"method": "emphasis", "spans": [span], "alpha": round(draw.uniform(0.01, 0.5), 3)}


def _head_scale(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    # Not 0: with a shift of the same head that is refused.
    scales = [[*head, round(draw.uniform(-0.5, 2.0), 3) or 0.5] for head in _heads(draw, geometry)]
    return {"method": "head_scale", "scales": scales}


def _head_ablation(draw: random.Random, geometry: ModelGeometry, prompt: str) -> dict[str, Any]:
    mode = draw.choice(("zero", "uniform", "identity"))
    u = {"u": 0.5} if mode == "identity" else {}
    return {"method": "head_ablation", "heads": _heads(draw, geometry), "mode": mode, **u}


def _heads(draw: random.Random, geometry: ModelGeometry) -> list[list[int]]:
    """Up to six different heads."""
    every = range(geometry.num_layers * geometry.num_heads)
    chosen = draw.sample(every, draw.randint(1, min(6, len(every))))
    return [list(divmod(each, geometry.num_heads)) for each in chosen]


SPECS: dict[str, Builder] = {
    "vhr": _vhr,
    "locore": _locore,
    "sgrs": _sgrs,
    "gact": _gact,
    "caa": _caa,
    "act": _act,
    "emphasis": _emphasis,
    "head_scale": _head_scale,
    "head_ablation": _head_ablation,
}
"""Method -> one with drawn options. `var`, and `vhr` that chooses heads, need images."""

MIXES: dict[str, tuple[str, ...]] = {
    "heads and window": ("vhr", "locore"),
    "window and emphasis": ("locore", "emphasis"),
    "vectors and heads": ("gact", "act", "head_scale"),
    "vectors and emphasis": ("caa", "emphasis"),
    "gate and window": ("sgrs", "locore"),
    "gate and heads": ("sgrs", "vhr"),
    "heads twice": ("vhr", "head_scale"),
}
"""Name -> methods that go together in one request."""

ZEROS: dict[str, dict[str, Any]] = {
    "vhr": {"method": "vhr", "heads": [[0, 0]], "alpha": 1.0},
    "locore": {"method": "locore", "beta": 0.0},
    "sgrs": {"method": "sgrs", "alpha": 0.0},
    "gact": {"method": "gact", "profile": PROFILES["gact"], "strength": 0.0},
    "emphasis": {"method": "emphasis", "spans": [{"tokens": [0, 1]}], "alpha": 1.0},
    "head_scale": {"method": "head_scale", "scales": [[0, 0, 1.0]]},
}
"""Method -> one of strength zero, which changes nothing."""
