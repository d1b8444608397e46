"""What it costs that VHR chooses its heads by the prompt: time to first token, and tokens/s after.

    headway bench head-selection --quick

One Headway engine of the demo image model serves all kinds of requests in turn, in random order, so
that whatever slows the machine for longer than a round slows all of them. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from headway.benchmarks.engine import KEEP_MEMORY, settings
from headway.benchmarks.environment import (
    busy_seconds,
    cpu_warnings,
    cuda_device,
    environment,
    interpreter_refusal,
)
from headway.benchmarks.image_questions import (
    BATCH,
    KNOWN_TEXTS,
    OUTPUT_TOKENS,
    Condition,
    ImageEngine,
    Timing,
)
from headway.benchmarks.options import rounds_option
from headway.benchmarks.statistics import (
    Ratio,
    paired_median,
    paired_ratio,
    spread,
    verdict,
)
from headway.server.models.demo_vlm import TOKENS_PER_IMAGE

NAME = "headway bench head-selection"
ROUNDS, QUICK_ROUNDS = 15, 3
ASKED = 10
"""How often each kind of request is made alone in a round, which also has a batch of two kinds."""
WARM_UP = 4
SETTINGS = {
    "VLLM_PLUGINS": "headway",
    # A warning for each picture, which writing costs time, while it changes nothing.
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment of the engine, beside that of the other benchmarks."""

AUTO = {"methods": [{"method": "vhr", "heads": "auto"}]}
"""The layers are those of the paper: 14 of the demo model's 30."""
UNSTEERED = Condition("unsteered")
COLD = Condition("auto, text never seen", AUTO, passes=1)
WARM = Condition("auto, text known", AUTO, is_known=True)
EXPLICIT = "explicit heads"
BATCHES = (Condition("unsteered", is_known=True), Condition("auto", AUTO, is_known=True))


@dataclass(frozen=True)
class Bar:
    """A ratio to unsteered requests, and the most or the least that it may be, None for a control.

    kind: "first token", of the seconds until then, or "decode", of tokens/s.
    """

    kind: str
    condition: str
    bar: float | None

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.kind == "first token"


BARS = (
    Bar("first token", COLD.name, 1.35),
    Bar("first token", WARM.name, 1.05),
    Bar("first token", EXPLICIT, None),
    Bar("decode", BATCHES[1].name, 0.97),
)


@dataclass
class Measurement:
    """Condition -> times to the first token, and of decoding batches, one after the other."""

    first_token: dict[str, list[Timing]] = field(default_factory=dict)
    decode: dict[str, list[Timing]] = field(default_factory=dict)
    foreign_share: float = 0.0


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON: 0 whatever the verdicts, 1 for an error.

    2 where nothing may be measured.
    """
    args = build_parser().parse_args(argv)
    if reason := interpreter_refusal():
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    on_cuda = cuda_device() is not None
    # glibc has read its own at the start of this process, in which the engine runs.
    given = settings(on_cuda) | SETTINGS
    used = {name: value for name, value in given.items() if name not in KEEP_MEMORY}
    used |= {name: os.environ[name] for name in KEEP_MEMORY if name in os.environ}
    os.environ.update(used)  # before vLLM is imported, which reads them
    try:
        with redirect_stdout(sys.stderr):
            facts, measurement = run(rounds, args.seed)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    result = report(measurement, facts | {"rounds": rounds, "seed": args.seed})
    result |= {"engine_settings": used, "environment": environment()}
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Measure what it costs that VHR chooses its heads by the prompt."
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    parser.add_argument(
        "--rounds", type=rounds_option, help=f"number of rounds, {ROUNDS} by default"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")
    parser.add_argument("--seed", type=int, default=0, help="of questions and their order")
    return parser


def run(rounds: int, seed: int) -> tuple[dict[str, Any], Measurement]:
    """Start the engine, warm it up and measure: what was measured on, and what.

    Raises FileNotFoundError if the model's parts are not installed, ValueError for more rounds
    than there are questions for, RuntimeError if a request was not served as it should be.
    """
    from headway.server.models.demo_vlm import ensure_demo_vlm

    engine = ImageEngine(ensure_demo_vlm(), seed)
    needed = 3 * (rounds * ASKED + WARM_UP) + KNOWN_TEXTS
    if needed > len(engine.new_texts):
        raise ValueError(f"{rounds} rounds need {needed} questions of {len(engine.new_texts)}")
    heads = warm_up(engine)
    facts = {
        "model": "demo-vlm",
        "dtype": str(engine.config.model_config.dtype).removeprefix("torch."),
        "cache_block_size": engine.config.cache_config.block_size,
        "prompt_tokens": engine.prompt_tokens,
        "text_tokens": engine.prompt_tokens - TOKENS_PER_IMAGE,
        "explicit_heads": heads,
    }
    return facts, measure(engine, conditions(heads), rounds, seed)


def conditions(heads: Sequence[Sequence[int]]) -> list[Condition]:
    """The kinds of requests that are made alone; heads: those named explicitly."""
    method = {"method": "vhr", "heads": [list(head) for head in heads]}
    return [UNSTEERED, COLD, WARM, Condition(EXPLICIT, {"methods": [method]})]


def warm_up(engine: ImageEngine) -> list[list[int]]:
    """Ask everything a few times, known texts first of all; the heads that one request chose."""
    first = Condition("a known text, the first time", AUTO, is_known=True, passes=1)
    for _ in range(KNOWN_TEXTS):
        _, report = engine.first_token(first)
    assert report is not None
    for condition in conditions(report.heads) * WARM_UP:
        engine.first_token(condition)
    for condition in BATCHES:
        engine.decode(condition, WARM_UP)
    return report.heads


def measure(engine: ImageEngine, alone: Sequence[Condition], rounds: int, seed: int) -> Measurement:
    """Ask everything `rounds` times; what is compared is asked close together."""
    order = random.Random(seed)
    measurement = Measurement(
        {condition.name: [] for condition in alone}, {condition.name: [] for condition in BATCHES}
    )
    started, used, busy = time.perf_counter(), time.process_time(), busy_seconds()
    for _ in tqdm(range(rounds), desc="measuring", unit="round", leave=False):
        for condition in order.sample(BATCHES, len(BATCHES)):
            measurement.decode[condition.name].append(engine.decode(condition))
        for _ in range(ASKED):
            for condition in order.sample(alone, len(alone)):
                timing, _ = engine.first_token(condition)
                measurement.first_token[condition.name].append(timing)
    foreign = busy_seconds() - busy - (time.process_time() - used)
    measurement.foreign_share = max(0.0, foreign) / (time.perf_counter() - started)
    return measurement


def report(measurement: Measurement, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured and what follows from it, as JSON values."""
    return {
        "benchmark": "head-selection",
        **facts,
        "batch": BATCH,
        "output_tokens": OUTPUT_TOKENS,
        "first_token": _rows(measurement.first_token),
        "decode": _rows(measurement.decode),
        "comparisons": [compare(bar, measurement) for bar in BARS],
        "foreign_cpu_share": measurement.foreign_share,
        "warnings": cpu_warnings(measurement.foreign_share) if cuda_device() is None else [],
    }


def compare(bar: Bar, measurement: Measurement) -> dict[str, Any]:
    """The ratio of a condition to unsteered requests, its interval and what that says of the bar.

    Of times to the first token, the median of the ratios of neighbours; of tokens/s their
    geometric mean. cpu_time: the same of CPU time.
    """
    ratio, cpu_ratio = (_ratio(bar, measurement, unit) for unit in ("seconds", "cpu_seconds"))
    found = None if bar.bar is None else str(verdict(ratio, bar.bar, bar.at_most))
    return {
        **asdict(bar),
        "at_most": bar.at_most,
        **asdict(ratio),
        "verdict": found,
        "cpu_time": asdict(cpu_ratio),
    }


def _ratio(bar: Bar, measurement: Measurement, unit: str) -> Ratio:
    if bar.at_most:
        asked, plain = (
            [float(getattr(timing, unit)) for timing in measurement.first_token[name]]
            for name in (bar.condition, UNSTEERED.name)
        )
        return paired_median(asked, plain)
    asked, plain = (
        [timing.tokens / getattr(timing, unit) for timing in measurement.decode[name]]
        for name in (bar.condition, BATCHES[0].name)
    )
    return paired_ratio(asked, plain)


def _rows(timings: dict[str, list[Timing]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(timing) for timing in each] for name, each in timings.items()}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    facts = result["environment"]
    lines = ["", f"{'time to first token':<42} {'median':>9} {'spread':>8}"]
    for name, rows in result["first_token"].items():
        seconds = [row["seconds"] for row in rows]
        middle = f"{1000 * float(np.median(seconds)):.1f} ms"
        lines.append(f"{name:<42} {middle:>9} {spread(seconds):>8.1%}")
    title = f"tokens/s of {result['batch']} requests, decoding"
    lines += ["", f"{title:<42} {'mean':>9} {'spread':>8}"]
    for name, rows in result["decode"].items():
        speeds = [row["tokens"] / row["seconds"] for row in rows]
        lines.append(f"{name:<42} {sum(speeds) / len(speeds):>9.1f} {spread(speeds):>8.1%}")
    lines += ["", f"{'relative to unsteered':<42} {'ratio':>7} {'95 % interval':>17} {'bar':>8}"]
    for row in result["comparisons"]:
        what = "time to first token" if row["at_most"] else "tokens/s"
        interval = f"{row['low']:.3f} .. {row['high']:.3f}"
        bar = f"{'<=' if row['at_most'] else '>='} {row['bar']:.2f}" if row["bar"] else "control"
        line = f"{what + ', ' + row['condition']:<42} {row['value']:>7.3f} {interval:>17} {bar:>8}"
        lines.append(f"{line}  {row['verdict'] or ''}".rstrip())
        if facts["cuda_device"] is None:
            cpu = row["cpu_time"]
            interval = f"{cpu['low']:.3f} .. {cpu['high']:.3f}"
            lines.append(f"{'  the same of CPU time':<42} {cpu['value']:>7.3f} {interval:>17}")
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    prompt = f"prompts of {result['prompt_tokens']} tokens, {result['text_tokens']} of them text"
    lines += ["", f"{prompt}; {result['model']}, {result['dtype']}, eager"]
    lines += [f"{result['rounds']} rounds; {packages}; commit {facts['commit']}"]
    host = f"{facts['cpu']}, {facts['usable_threads']} threads"
    device = facts["cuda_device"]
    lines += [f"measured on {device}; host: {host}" if device else host]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result["warnings"])])
