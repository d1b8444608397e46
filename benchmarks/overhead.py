"""The cost of Headway in tokens/s: idle against stock vLLM, and steering against idle.

    headway bench overhead --quick

Both engines live at the same time, each in its own process; in every round each load is served
once, while the other engine waits: loads that are compared close together, else in random order.
Ratios are taken within rounds, so that what slows the machine for longer slows both sides. See
README.md here.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headway.benchmarks.engine import DEVICE_MEMORY, Engine, EngineError, settings
from headway.benchmarks.environment import (
    busy_seconds,
    cpu_warnings,
    cuda_device,
    environment,
    interpreter_refusal,
    too_busy,
)
from headway.benchmarks.options import chosen_model, new_parser, output_file, save
from headway.benchmarks.rounds import compared_together, shuffled
from headway.benchmarks.scenarios import (
    QUICK,
    Comparison,
    Scenario,
    available,
    needed_by,
    selected,
    shortened,
    sized,
)
from headway.benchmarks.statistics import paired_ratio, spread, verdict

NAME = "headway bench overhead"
QUICK_ROUNDS = 7
PROMPT_TOKENS, QUICK_PROMPT_TOKENS = 64, 32
"""Short, so that a run is mostly decoding, where an edit per layer weighs most, and takes seconds:
the machine's speed changes as fast, and many rounds tell more than long ones.
"""
ROUNDS = 30
MIN_PROMPTS_CACHED = 0.95
"""Share of the prompt tokens that a load with `cached` prompts must find in the prefix cache."""


@dataclass
class Measurement:
    """The runs of every scenario by name, round by round, and what disturbed them."""

    runs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    idle_share: float = 0.0
    foreign_share: float = 0.0

    def tokens_per_second(self, name: str) -> list[float]:
        """Output tokens per second of wall-clock time, by round."""
        return [run["tokens"] / run["seconds"] for run in self.runs[name]]

    def tokens_per_cpu_second(self, name: str) -> list[float]:
        """Output tokens per second of CPU time: blind to other processes' use of the machine."""
        return [run["tokens"] / run["cpu_seconds"] for run in self.runs[name]]


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON: 0 whatever the verdicts, 1 for an error.

    2 where nothing may be measured.
    """
    args = build_parser().parse_args(argv)
    if reason := interpreter_refusal():
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    prompt_tokens = QUICK_PROMPT_TOKENS if args.quick else PROMPT_TOKENS
    on_cuda = cuda_device() is not None
    try:
        model = chosen_model(args.model)
        scenarios, comparisons = available(on_cuda)
        if args.only:
            scenarios, comparisons = selected(scenarios, comparisons, args.only)
        elif args.quick:
            comparisons = tuple(each for each in comparisons if each.name in QUICK)
            scenarios = shortened(needed_by(comparisons, scenarios))
        scenarios = sized(scenarios, args.dtype, prompt_tokens, not on_cuda)
        verified, measurement = measure(scenarios, comparisons, model, rounds, args.seed, on_cuda)
    except (EngineError, OSError, ValueError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    result = report(scenarios, comparisons, measurement)
    result |= {"verified": verified, "model": model.name, "seed": args.seed}
    save(result, table(result), output_file("overhead", args.output))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = new_parser(
        NAME,
        "Measure what Headway costs in tokens/s.",
        rounds=ROUNDS,
        seed="the order within rounds",
        quick=f"{QUICK_ROUNDS} rounds of short requests, one comparison of every kind",
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="the comparisons with this in their name, such as G-ACT"
    )
    return parser


def measure(
    scenarios: Sequence[Scenario],
    comparisons: Sequence[Comparison],
    model: Path,
    rounds: int,
    seed: int,
    on_cuda: bool = False,
) -> tuple[dict[str, Any], Measurement]:
    """Start the engines, warm each load up and run all of them `rounds` times.

    Returns what was verified about each load, and the runs. on_cuda: the engines share a CUDA
    device, else the processor. Raises EngineError.
    """
    measurement = Measurement({scenario.name: [] for scenario in scenarios})
    order = random.Random(seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headway-bench-")))
        shared: dict[Any, list[Scenario]] = {}
        for scenario in scenarios:
            shared.setdefault(scenario.engine, []).append(scenario)
        engines: dict[str, Engine] = {}
        verified: dict[str, Any] = {}
        memory = DEVICE_MEMORY / len(shared) if on_cuda else None
        # One after the other: their thread pools would fight over the same cores, and on a device
        # each measures how much memory it takes.
        for group in tqdm(shared.values(), desc="starting engines", unit="engine", leave=False):
            engine = Engine(group, model, folder / f"{group[0].name}.log", memory)
            stack.callback(engine.close)
            verified |= engine.ready()
            engines |= dict.fromkeys(engine.names, engine)
        for name, engine in engines.items():
            engine.run(name)  # the last warm-up, now that no other engine is starting
        watch = Watch(engines)
        pairs = [(each.scenario, each.baseline) for each in comparisons]
        groups = compared_together(list(engines), pairs)
        for _ in tqdm(range(rounds), desc="measuring", unit="round", leave=False):
            for name in shuffled(groups, order):
                measurement.runs[name].append(watch.run(name))
        measurement.idle_share, measurement.foreign_share = watch.shares()
    return verified, measurement


class Watch:
    """Runs engines one at a time and adds up the CPU time that anyone else used meanwhile."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines
        self.seconds = self.idle = self.foreign = 0.0

    def run(self, name: str) -> dict[str, float]:
        """One run of one load."""
        engine = self.engines[name]
        started = time.perf_counter()
        before, busy = self._cpu(), busy_seconds()
        result = engine.run(name)
        after, busy = self._cpu(), busy_seconds() - busy
        used = {each: after[each] - before[each] for each in after}
        self.seconds += time.perf_counter() - started
        self.idle += sum(used.values()) - used[engine]
        self.foreign += max(0.0, busy - sum(used.values()))
        return result

    def shares(self) -> tuple[float, float]:
        """CPU time of waiting engines, and of processes that are no engine, per second of run."""
        return self.idle / self.seconds, self.foreign / self.seconds

    def _cpu(self) -> dict[Engine, float]:
        return {engine: engine.cpu_seconds() for engine in set(self.engines.values())}


def report(
    scenarios: Sequence[Scenario], comparisons: Sequence[Comparison], measurement: Measurement
) -> dict[str, Any]:
    """Everything that was measured and what follows from it, as JSON values."""
    facts = environment()
    on_cuda = facts["cuda_device"] is not None
    loads = {each.name: each for each in scenarios}
    rows = []
    for scenario in scenarios:
        speeds = measurement.tokens_per_second(scenario.name)
        rows.append(
            {
                **asdict(scenario),
                "tokens_per_second": sum(speeds) / len(speeds),
                "spread": spread(speeds),
                "runs": measurement.runs[scenario.name],
            }
        )
    return {
        "benchmark": "overhead",
        "scenarios": rows,
        "comparisons": [
            _compare(each, loads[each.scenario], measurement, on_cuda) for each in comparisons
        ],
        "idle_engines_cpu_share": measurement.idle_share,
        "foreign_cpu_share": measurement.foreign_share,
        "warnings": _cache_warnings(scenarios, measurement)
        + ([] if on_cuda else cpu_warnings(measurement.foreign_share, measurement.idle_share)),
        "engine_settings": settings(on_cuda),
        "environment": facts,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    facts = result["environment"]
    device = facts["cuda_device"]
    lines = ["", f"{'engine':<42} {'tokens/s':>9} {'spread':>8}"]
    for row in result["scenarios"]:
        lines.append(f"{row['name']:<42} {row['tokens_per_second']:>9.1f} {row['spread']:>8.1%}")
    lines += ["", f"{'tokens/s, ratio':<42} {'ratio':>7} {'95 % interval':>17} {'bar':>6}  verdict"]
    for row in result["comparisons"]:
        interval = f"{row['low']:.3f} .. {row['high']:.3f}"
        lines.append(
            f"{row['name']:<42} {row['ratio']:>7.3f} {interval:>17} {row['bar']:>6.2f}"
            f"  {row['verdict']}"
        )
        if device is not None:
            continue  # the host's CPU time, much of it spent waiting
        cpu = row["per_cpu_second"]
        interval = f"{cpu['low']:.3f} .. {cpu['high']:.3f}"
        lines.append(
            f"{'  the same per second of CPU time':<42} {cpu['value']:>7.3f} {interval:>17}"
        )
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    first = result["scenarios"][0]
    rounds = len(first["runs"])
    lines += ["", f"{rounds} rounds; {packages}; commit {facts['commit']}"]
    host = f"{facts['cpu']}, {facts['usable_threads']} threads"
    if device is not None:
        host = f"measured on {device}, {first['dtype']}, CUDA graphs; host: {host}"
    lines += [host]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)


def _compare(
    comparison: Comparison, load: Scenario, measurement: Measurement, on_cuda: bool
) -> dict[str, Any]:
    name, baseline = comparison.scenario, comparison.baseline
    speed, cpu_speed = measurement.tokens_per_second, measurement.tokens_per_cpu_second
    ratio = paired_ratio(speed(name), speed(baseline))
    per_cpu_second = paired_ratio(cpu_speed(name), cpu_speed(baseline))
    busy = None if on_cuda else too_busy(measurement.foreign_share)
    return {
        **asdict(comparison),
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "verdict": busy or str(verdict(ratio, comparison.bar)),
        "per_cpu_second": asdict(per_cpu_second),
    }


def _cache_warnings(scenarios: Sequence[Scenario], measurement: Measurement) -> list[str]:
    """The KV cache may be so small, or the model so large, that it keeps few prompts."""
    recomputed = [
        each.name
        for each in scenarios
        if each.cached
        and min(run["prompts_cached"] for run in measurement.runs[each.name]) < MIN_PROMPTS_CACHED
    ]
    message = "the KV cache is too small, prompts were computed again, not only decoded, in"
    return [f"{message}: {'; '.join(recomputed)}"] if recomputed else []
