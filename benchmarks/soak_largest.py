"""The largest requests of a soak, all at once, before it begins.

What a process takes from the system at its peak, its allocator seldom gives back. Were the peaks
left to chance, one that comes late would look like a leak.
"""

from __future__ import annotations

import random
from typing import Any

from headway.benchmarks.soak_asks import COMPLETIONS, Ask, Place, Script
from headway.benchmarks.soak_bodies import MOST_SENTENCES, body, hot_prompt, own_prompt
from headway.benchmarks.soak_specs import SPECS

KIND = "largest"
MOST_CHOICES = 3
TOKENS = 6
SGRS = {"method": "sgrs", "top_k": 8, "max_resample": 3}


def largest(place: Place, seed: int, concurrency: int) -> Script:
    """As many as run at a time of each kind that takes much memory: a step for each.

    Every other one is steered; all where the step is of SGRS.
    """
    draw = random.Random(f"{seed}-largest")
    attention = {"steering": {"methods": _attention(draw, place), "report": "full"}}
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"prompt_logprobs": 1}, attention),
        ({"logprobs": 20, "n": MOST_CHOICES, "temperature": 1.0}, attention),
        ({"response_format": {"type": "json_object"}}, attention),
    ]
    if "sgrs" in place.methods:
        gated = {"steering": {"methods": [SGRS], "report": "full"}}
        kinds.append((gated, gated))
    script = []
    for number, (fields, steering) in enumerate(kinds):
        step = []
        for index in range(concurrency):
            name = f"soak-{seed}-largest-{number}-{index}"
            # Of different lengths, or the allocator would see one size alone.
            prompt = own_prompt(draw, name, 1 + index % MOST_SENTENCES)
            if index % 4 == 0:
                prompt = hot_prompt(-1000 - index)
            chosen = fields | steering if index % 2 else fields
            asked = body(place, draw, COMPLETIONS, prompt, TOKENS, **chosen)
            step.append(Ask(KIND, COMPLETIONS, asked, steered="steering" in chosen))
        script.append(step)
    return script


def _attention(draw: random.Random, place: Place) -> list[dict[str, Any]]:
    """Methods that edit attention, where the server can."""
    names: list[str] = [name for name in ("locore", "emphasis") if name in place.methods]
    return [SPECS[name](draw, place.geometry, "") for name in names or ["head_scale"]]
