"""What SGRS costs: time per output token, to unsteered requests and to the published procedure.

    headway bench sgrs --quick

One `headway serve` answers all kinds of requests in turn, in random order; in each round one
candidate is also judged by the published procedure while the server waits. Ratios are taken within
rounds, so that whatever slows the machine for longer than a round slows both. See README.md here.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headway.benchmarks.completions import Completion, seconds_per_token
from headway.benchmarks.engine import (
    KEEP_MEMORY,
    SERVER_SETTINGS,
    EngineError,
    server_settings,
)
from headway.benchmarks.environment import (
    busy_seconds,
    cpu_warnings,
    cuda_device,
    environment,
    has_native_bfloat16,
    interpreter_refusal,
    own_seconds,
)
from headway.benchmarks.options import chosen_model, new_parser, output_file, save
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.sgrs_load import (
    ARMS,
    BATCH,
    READ,
    SGRS,
    SGRS_BATCH,
    UNSTEERED,
    UNSTEERED_BATCH,
    Judged,
    Requests,
    draws_per_token,
)
from headway.benchmarks.sgrs_published import PublishedProcess
from headway.benchmarks.statistics import paired_ratio, spread, verdict
from headway.server.launch import LaunchError, serve

NAME = "headway bench sgrs"
ROUNDS, QUICK_ROUNDS = 15, 3
OUTPUT_TOKENS, QUICK_OUTPUT_TOKENS = 64, 12
CONTEXT = 600
PUBLISHED = "published procedure"
MAX_DISAGREEMENT = {"float32": 0.01, "bfloat16": 0.15}
"""Relative difference of a saliency by both ways, from which on a warning is due."""


@dataclass(frozen=True)
class Bar:
    """Time per output token of one arm relative to another, and the most that it may be.

    at_most: else the least; bar: None for a control.
    """

    name: str
    arm: str
    baseline: str
    bar: float | None = None
    at_most: bool = True


BARS = (
    Bar("SGRS / unsteered, alone", SGRS.name, UNSTEERED.name, 2.5),
    Bar(f"SGRS / unsteered, {BATCH} together", SGRS_BATCH.name, UNSTEERED_BATCH.name, 2.5),
    Bar("published procedure / SGRS, alone", PUBLISHED, SGRS.name, 100.0, at_most=False),
    Bar("saliencies read / unsteered, alone", READ.name, UNSTEERED.name),
)


@dataclass
class Measurement:
    """Seconds per output token by arm, round by round, and what else was seen.

    draws: candidates per token, of all requests with SGRS; evaluations: seconds that the published
    procedure took for one. saliency: of one token by Headway; published_saliency: by the procedure.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {arm.name: [] for arm in ARMS})
    draws: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    saliency: float = 0.0
    published_saliency: float = 0.0
    foreign_share: float = 0.0

    def per_token(self, name: str) -> list[float]:
        """Seconds per output token; of the published procedure, those of judging its candidates."""
        if name == PUBLISHED:
            pairs = zip(self.evaluations, self.draws, strict=True)
            return [seconds * draws for seconds, draws in pairs]
        return self.seconds[name]


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON: 0 whatever the verdicts, 1 for an error.

    2 where nothing may be measured.
    """
    args = build_parser().parse_args(argv)
    reason = interpreter_refusal()
    if reason is None and cuda_device() is not None:
        reason = "SGRS does not run on a CUDA device yet"
    if reason:
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    output_tokens = QUICK_OUTPUT_TOKENS if args.quick else OUTPUT_TOKENS
    output = output_file("sgrs", args.output)
    log = output.with_suffix(".log")
    try:
        model = chosen_model(args.model)
        measurement = run(model, log, args.dtype, args.context, output_tokens, rounds, args.seed)
    except (EndpointError, EngineError, LaunchError, OSError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    facts = {"model": model.name, "dtype": args.dtype, "seed": args.seed}
    facts |= {"context": args.context, "output_tokens": output_tokens}
    result = report(measurement, facts)
    save(result, table(result), output)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    quick = (
        f"{QUICK_ROUNDS} rounds of {QUICK_OUTPUT_TOKENS} tokens, not {ROUNDS} of {OUTPUT_TOKENS}"
    )
    parser = new_parser(
        NAME,
        "Measure what SGRS costs, and what it costs as it was published.",
        rounds=ROUNDS,
        seed="prompts, draws and order",
        quick=quick,
    )
    parser.add_argument(
        "--context", type=_context, default=CONTEXT, help="mean tokens, %(default)s by default"
    )
    return parser


def run(
    model: Path, log: Path, dtype: str, context: int, output_tokens: int, rounds: int, seed: int
) -> Measurement:
    """Start the server, which writes `log`, and measure.

    Raises EndpointError, EngineError or LaunchError.
    """
    flags = ["--dtype", dtype, "--enforce-eager", "--max-num-seqs", str(BATCH)]
    longest = context + output_tokens
    flags += ["--max-model-len", str(longest), "--max-sgrs-requests", str(BATCH)]
    # All prompts in one step: vLLM's CPU engine dies where one whose request has a seed is cut.
    flags += ["--max-num-batched-tokens", str(BATCH * longest)]
    measurement = None
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(PublishedProcess(model, dtype)) as published,  # loads while the server starts
    ):
        try:
            print("starting headway serve, usually in less than a minute", file=sys.stderr)
            with serve(model, flags, Path(folder), log, SERVER_SETTINGS) as url:
                requests = Requests(url, model, context, output_tokens, seed)
                measurement = measure(requests, published, rounds, seed)
        except (EndpointError, LaunchError) as error:
            message = f"{error}; see {log}"
            if measurement is None:
                raise type(error)(message) from None
            # A server that does not end well takes nothing from what was measured before.
            print(f"{NAME}: warning: {message}", file=sys.stderr)
    return measurement


def measure(requests: Requests, published: PublishedProcess, rounds: int, seed: int) -> Measurement:
    """Warm everything up, then run all of it `rounds` times. Raises EndpointError, EngineError."""
    measurement = Measurement()
    order = random.Random(seed)
    for arm in (SGRS_BATCH, UNSTEERED_BATCH):  # which bring every prompt into the cache
        requests.run(arm, 0)
    judged = requests.judged()
    measurement.saliency = judged.saliency
    measurement.published_saliency, _ = evaluate(published, judged)
    names = [*(arm.name for arm in ARMS), PUBLISHED]
    arms = {arm.name: arm for arm in ARMS}
    started, own, busy = time.perf_counter(), own_seconds(), busy_seconds()
    for index in tqdm(range(rounds), desc="measuring", unit="round", leave=False):
        gated: list[Completion] = []
        for name in order.sample(names, len(names)):
            if name == PUBLISHED:
                measurement.evaluations.append(evaluate(published, judged)[1])
                continue
            answers = requests.run(arms[name], index)
            measurement.seconds[name].append(seconds_per_token(answers))
            gated += answers if arms[name].judges else []
        measurement.draws.append(draws_per_token(gated))
    foreign = busy_seconds() - busy - (own_seconds() - own)
    measurement.foreign_share = max(0.0, foreign) / (time.perf_counter() - started)
    return measurement


def evaluate(published: PublishedProcess, judged: Judged) -> tuple[float, float]:
    """The saliency of a token by the published procedure, and the seconds for it."""
    return published.timed(judged.context, judged.token, judged.layers, judged.prompt_len)


def report(measurement: Measurement, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured and what follows from it, as JSON values.

    facts: has at least `dtype`.
    """
    arms = []
    for name in (*(arm.name for arm in ARMS), PUBLISHED):
        runs = measurement.per_token(name)
        mean = sum(runs) / len(runs)
        arms.append({"name": name, "seconds": mean, "spread": spread(runs), "runs": runs})
    ours, theirs = measurement.saliency, measurement.published_saliency
    warnings = cpu_warnings(measurement.foreign_share)
    if not math.isclose(ours, theirs, rel_tol=MAX_DISAGREEMENT[facts["dtype"]]):
        warnings.append(f"the saliency of a token is {ours:.5f}, as published {theirs:.5f}")
    return {
        "benchmark": "sgrs",
        **facts,
        "rounds": len(measurement.evaluations),
        "arms": arms,
        "comparisons": [compare(bar, measurement) for bar in BARS],
        "draws_per_token": measurement.draws,
        "seconds_per_evaluation": measurement.evaluations,
        "saliency": {"headway": ours, PUBLISHED: theirs},
        "foreign_cpu_share": measurement.foreign_share,
        "warnings": warnings,
        "engine_settings": server_settings(),
        "published_settings": KEEP_MEMORY,
        "native_bfloat16": has_native_bfloat16(),
        "environment": environment(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def compare(bar: Bar, measurement: Measurement) -> dict[str, Any]:
    """The ratio of two arms, its interval, and on which side of the bar that lies."""
    ratio = paired_ratio(measurement.per_token(bar.arm), measurement.per_token(bar.baseline))
    found = None
    if bar.bar is not None:
        found = str(verdict(ratio, bar.bar, bar.at_most))
    return {**asdict(bar), **asdict(ratio), "verdict": found}


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    facts = result["environment"]
    lines = ["", f"{'time per output token':<42} {'mean':>10} {'spread':>8}"]
    for row in result["arms"]:
        mean = f"{1000 * row['seconds']:.1f} ms"
        lines.append(f"{row['name']:<42} {mean:>10} {row['spread']:>8.1%}")
    lines += ["", f"{'ratio of these':<42} {'ratio':>7} {'95 % interval':>17} {'bar':>9}  verdict"]
    for row in result["comparisons"]:
        interval = f"{row['low']:.2f} .. {row['high']:.2f}"
        bar = f"{'<=' if row['at_most'] else '>='} {row['bar']:.1f}" if row["bar"] else "control"
        line = f"{row['name']:<42} {row['value']:>7.2f} {interval:>17} {bar:>9}"
        lines.append(f"{line}  {row['verdict'] or ''}".rstrip())
    draws, seconds = (
        sum(result[key]) / len(result[key]) for key in ("draws_per_token", "seconds_per_evaluation")
    )
    ours, theirs = result["saliency"].values()
    lines += ["", f"as published: {seconds:.2f} s for a candidate, {draws:.2f} drawn for a token"]
    lines += [f"the saliency of one token: {ours:.5f}, as published {theirs:.5f}"]
    load = f"mean context {result['context']}, {result['output_tokens']} tokens a request"
    lines += ["", f"{load}; {result['model']}, {result['dtype']}, eager"]
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    lines += [f"{result['rounds']} rounds; {packages}; commit {facts['commit']}"]
    lines += [f"{facts['cpu']}, {facts['usable_threads']} threads"]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result["warnings"])])


def _context(value: str) -> int:
    context = int(value)
    if context <= OUTPUT_TOKENS:
        raise argparse.ArgumentTypeError(f"more than {OUTPUT_TOKENS}, which are output")
    return context
