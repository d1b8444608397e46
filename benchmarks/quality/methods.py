"""The arms of a comparison: what is asked of the server in each, and what a control draws.

A control does to other heads what VHR does to the heads it chose, as many of them in the same
layers for the same picture and prompt: random ones, or those with the lowest vision-aware head
divergence (VHD). What a control achieves too is no merit of the choice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

UNSTEERED = "unsteered"
NAMES = (UNSTEERED, "vhr", "var", "locore", "vhr+locore", "sgrs", "random", "lowest")
"""The arms that exist by name; `random` is as many arms as there are seeds."""

Method = Mapping[str, Any]


@dataclass(frozen=True)
class Control:
    """Which heads a control takes in place of those of the arm `reference`."""

    kind: Literal["random", "lowest"]
    reference: str = "vhr"
    seed: int = 0


@dataclass(frozen=True)
class Arm:
    """One column of the comparison: a list of methods, or a control; neither: unsteered."""

    name: str
    methods: tuple[Method, ...] = ()
    control: Control | None = None


@dataclass(frozen=True)
class Settings:
    """What the named arms are made of.

    vhr_layers: "default" or layers; vhd: mean VHD, [layers][heads], for the arm `lowest`.
    """

    vhr_alpha: float = 2.0
    vhr_layers: Literal["default"] | tuple[int, ...] = "default"
    var: Mapping[str, Any] | None = None
    random_seeds: int = 3
    seed: int = 0
    vhd: tuple[tuple[float, ...], ...] | None = None


def named_arms(name: str, settings: Settings) -> list[Arm]:
    """The arms of a name from NAMES. Raises KeyError for another one."""
    vhr: dict[str, Any] = {"method": "vhr", "alpha": settings.vhr_alpha, "heads": "auto"}
    if settings.vhr_layers != "default":
        vhr["layers"] = list(settings.vhr_layers)
    locore = {"method": "locore"}
    if name == "random":
        first = settings.seed
        return [
            Arm(f"random {seed}", control=Control("random", seed=seed))
            for seed in range(first, first + settings.random_seeds)
        ]
    return [
        {
            UNSTEERED: Arm(UNSTEERED),
            "vhr": Arm("vhr", (vhr,)),
            "var": Arm("var", ({"method": "var", **(settings.var or {})},)),
            "locore": Arm("locore", (locore,)),
            "vhr+locore": Arm("vhr+locore", (vhr, locore)),
            "sgrs": Arm("sgrs", ({"method": "sgrs"},)),
            "lowest": Arm("lowest", control=Control("lowest")),
        }[name]
    ]


def sweep_arms(text: str, arms: Sequence[Arm]) -> list[Arm]:
    """Arms of a sweep `METHOD.PARAM=v1,v2,...`: the arm named METHOD with each value in turn.

    A value is a JSON scalar, a range of layers "1-14", or else a word. Raises ValueError.
    """
    path, _, values = text.partition("=")
    name, _, parameter = path.rpartition(".")
    base = next((arm for arm in arms if arm.name == name and arm.methods), None)
    if base is None or not parameter or not values:
        known = ", ".join(arm.name for arm in arms if arm.methods)
        raise ValueError(f"{text!r} is no METHOD.PARAM=v1,v2,... of an arm among {known}")
    first, *others = base.methods
    return [
        replace(
            base,
            name=f"{name} {parameter}={value}",
            methods=({**first, parameter: parse_value(value)}, *others),
        )
        for value in values.split(",")
    ]


def parse_value(text: str) -> Any:
    """A JSON scalar; a list of integers for "1-14"; otherwise the text itself."""
    start, dash, stop = text.partition("-")
    if dash and start.isdigit() and stop.isdigit():
        return list(range(int(start), int(stop) + 1))
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_arm(text: str) -> Arm:
    """An arm from `NAME=JSON`, the JSON being a list of methods. Raises ValueError."""
    name, _, value = text.partition("=")
    try:
        methods = json.loads(value)
    except ValueError:
        methods = None
    if not name or not isinstance(methods, list) or not methods:
        raise ValueError(f"{text!r} is no NAME=JSON with a list of methods")
    if not all(isinstance(each, dict) and "method" in each for each in methods):
        raise ValueError(f"{text!r}: every method needs its name in `method`")
    return Arm(name, tuple(methods))


def read_vhd(path: Path) -> tuple[tuple[float, ...], ...]:
    """Mean VHD by layer and head from a profile of `headway calibrate heads`.

    Raises OSError, or ValueError if the file has no rectangular `vhd`.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["vhd"]
        table = tuple(tuple(float(value) for value in row) for row in rows)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} has no "vhd" of [layers][heads]') from None
    if not table or len({len(row) for row in table}) != 1:
        raise ValueError(f'the "vhd" of {path} is not [layers][heads]')
    return table


def left_out(arm: Arm, settings: Settings, capabilities: Mapping[str, Any] | None) -> str | None:
    """Why an arm cannot be run at this endpoint, or None.

    capabilities: of /v1/steering/capabilities, None where the endpoint has no such route.
    """
    if arm.control is None and not arm.methods:
        return None
    if capabilities is None:
        return "the endpoint is no Headway server"
    wanted = {str(each["method"]) for each in arm.methods} or {"vhr"}
    if missing := sorted(wanted - set(capabilities["methods"])):
        return f"this server has no method {', '.join(missing)}"
    if arm.control is not None and arm.control.kind == "lowest":
        model = capabilities["model"]
        if settings.vhd is None:
            return "needs the VHD of each head: --vhd FILE, from `headway calibrate heads`"
        if (len(settings.vhd), len(settings.vhd[0])) != (model["num_layers"], model["num_heads"]):
            return "the VHD of --vhd is of a model of other sizes"
    return None


def chosen_heads(steering: Mapping[str, Any] | None) -> tuple[list[tuple[int, int]], float] | None:
    """The heads and alpha of VHR in an answer's `steering` object; None if it names none."""
    for method in (steering or {}).get("methods", ()):
        heads = method.get("heads")
        if method.get("method") == "vhr" and isinstance(heads, list) and heads:
            return [(int(layer), int(head)) for layer, head in heads], method["alpha"]
    return None


def control_methods(
    control: Control,
    request: str,
    steering: Mapping[str, Any] | None,
    num_heads: int,
    vhd: Sequence[Sequence[float]] | None = None,
) -> tuple[Method, ...]:
    """What a control asks for in place of the reference's heads, given its `steering` object.

    request: names picture and prompt, so that each draws heads of its own. Raises ValueError if
    the reference's answer names no heads.
    """
    chosen = chosen_heads(steering)
    if chosen is None:
        raise ValueError(f"the answers of {control.reference} name no heads to match")
    heads, alpha = chosen
    digest = hashlib.sha256(f"{control.seed} {request}".encode()).digest()
    generator = Random(int.from_bytes(digest[:8], "big"))
    taken: list[list[int]] = []
    for layer, number in sorted(Counter(layer for layer, _ in heads).items()):
        if control.kind == "random":
            picked = generator.sample(range(num_heads), number)
        else:
            if vhd is None:
                raise ValueError("no VHD to find the lowest heads by")
            picked = sorted(range(num_heads), key=vhd[layer].__getitem__)[:number]
        taken += [[layer, head] for head in sorted(picked)]
    return ({"method": "vhr", "alpha": alpha, "heads": taken},)
