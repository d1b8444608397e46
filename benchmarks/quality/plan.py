"""What a run of `headway bench quality` consists of, by its options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from headway.benchmarks.quality import methods, suites
from headway.benchmarks.quality.methods import Arm, Settings
from headway.benchmarks.quality.suites import Suite

SCENES, QUICK_SCENES = 300, 40
RANDOM_SEEDS, QUICK_RANDOM_SEEDS = 3, 1
QUICK_PARAGRAPHS = 3
QUICK_ARMS = "unsteered,vhr,random,var,locore,vhr+locore"
QUICK_WITHOUT = frozenset({"popular", "random"})
"""Question sets that --quick leaves out: those that the demo model answers well in any case."""
DEMO_SETTINGS = Settings(
    vhr_alpha=1.5,
    # Chosen on the prior split: see benchmarks/README.md.
    vhr_layers=tuple(range(8, 15)),
    # No image token of the demo model is a sink; its first token is one, in this dimension.
    var={"sink_dims": [507], "tau": 20},
)


@dataclass(frozen=True)
class Plan:
    """What is to be run: suites, arms in order, and the arms of each sweep by name."""

    suites: tuple[Suite, ...]
    arms: tuple[Arm, ...]
    sweeps: dict[str, list[str]]
    settings: Settings


def make_plan(args: argparse.Namespace) -> Plan:
    """Suites and arms from the options. Raises ValueError or OSError for what cannot be done."""
    if bool(args.url) != bool(args.model):
        raise ValueError("--url and --model go together")
    settings = make_settings(args)
    arms = make_arms(args, settings)
    sweeps = {}
    for text in args.sweep:
        swept = methods.sweep_arms(text, arms)
        sweeps[text.partition("=")[0]] = [arm.name for arm in swept]
        arms += swept
    names = [arm.name for arm in arms]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"given twice: {', '.join(sorted(repeated))}")
    return Plan(tuple(make_suites(args)), tuple(arms), sweeps, settings)


def make_settings(args: argparse.Namespace) -> Settings:
    """The parameters of the named arms: the demo model's own without --url."""
    settings = Settings() if args.url else DEMO_SETTINGS
    layers = settings.vhr_layers
    if args.vhr_layers == "default":
        layers = "default"
    elif args.vhr_layers is not None:
        parsed = methods.parse_value(args.vhr_layers)
        if not isinstance(parsed, list):
            raise ValueError(f"--vhr-layers: {args.vhr_layers!r} is no range such as 1-14")
        layers = tuple(parsed)
    seeds = args.random_seeds or (QUICK_RANDOM_SEEDS if args.quick else RANDOM_SEEDS)
    return replace(
        settings,
        vhr_layers=layers,
        vhr_alpha=settings.vhr_alpha if args.vhr_alpha is None else args.vhr_alpha,
        random_seeds=seeds,
        seed=args.seed,
        vhd=methods.read_vhd(args.vhd) if args.vhd else None,
    )


def make_arms(args: argparse.Namespace, settings: Settings) -> list[Arm]:
    """The arms that --arms names and --arm adds or replaces, in this order."""
    own = {arm.name: arm for arm in map(methods.parse_arm, args.arm)}
    names = (args.arms or (QUICK_ARMS if args.quick else ",".join(methods.NAMES))).split(",")
    arms: list[Arm] = []
    for name in [*names, *(name for name in own if name not in names)]:
        if name in own:
            arms.append(own[name])
        elif name in methods.NAMES:
            arms += methods.named_arms(name, settings)
        else:
            raise ValueError(f"there is no arm {name!r}; there are {', '.join(methods.NAMES)}")
    return arms


def make_suites(args: argparse.Namespace) -> list[Suite]:
    """The suites that the options name; the demo scenes if they name no data."""
    count = args.scenes or (QUICK_SCENES if args.quick else SCENES)
    found: list[Suite] = []
    if (args.pope or args.chair_annotations) and not args.images:
        raise ValueError("--pope and --chair-annotations need --images")
    if args.pope:
        found.append(suites.pope_suite(args.pope, args.images, args.scenes))
    if args.chair_annotations:
        if not args.synonyms:
            raise ValueError("--chair-annotations needs --synonyms")
        found.append(
            suites.coco_suite(args.chair_annotations, args.synonyms, args.images, count, args.seed)
        )
    if not found:
        splits = ("prior", "counter") if args.split == "both" else (args.split,)
        found = [suites.scene_suite(each, count, args.first, args.seed) for each in splits]
        if args.quick:
            found = [suites.without_sets(suite, QUICK_WITHOUT) for suite in found]
        if args.focus_only:
            found = [suites.only_focus(suite) for suite in found]
    changes = {
        "caption_prompt": args.caption_prompt,
        "caption_tokens": args.caption_tokens,
        "answer_tokens": args.answer_tokens,
    }
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return [replace(suite, **given) for suite in found]
