"""The report of `headway bench serve`: what was measured, ratios, and what may be concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from headway.benchmarks.engine import server_settings
from headway.benchmarks.environment import cpu_warnings, environment, too_busy
from headway.benchmarks.report_parts import METRICS
from headway.benchmarks.serve_load import Run
from headway.benchmarks.serve_matrix import (
    TEXT,
    TOKENS_PER_SECOND,
    Cell,
    Comparison,
    cells,
)
from headway.benchmarks.statistics import paired_ratio, verdict

TIMES = ("ttft", "tpot", "itl", "e2e", "cold_e2e")
PERCENTILES = (50, 90, 99)
MIN_CACHED = 0.95
"""Share of the prompts that what is timed as decoding must find in the prefix cache."""
Runs = Mapping[Cell, Sequence[Run]]


def report(
    compared: Sequence[Comparison],
    runs: Runs,
    memory: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
    on_cuda: bool = False,
) -> dict[str, Any]:
    """Everything that was measured and what follows from it, as JSON values.

    memory: of each server, MiB; facts: model, dtype, seed, rounds and output_tokens. on_cuda: what
    uses the cores is no matter.
    """
    every = [run for each in runs.values() for run in each]
    warnings = [] if on_cuda else cpu_warnings(*(mean(every, name) for name in SHARES))
    recomputed = [
        cell.name
        for cell in cells(compared)
        if cell.modality == TEXT and min(run.cached for run in runs[cell]) < MIN_CACHED
    ]
    if recomputed:
        message = "the KV cache is too small, prompts were computed again, not only decoded, in"
        warnings.append(f"{message}: {'; '.join(recomputed)}")
    return {
        "benchmark": "serve",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment() | {"server_settings": server_settings()},
        **facts,
        "warnings": warnings,
        "memory": {name: dict(found) for name, found in memory.items()},
        "cells": [row(cell, runs[cell]) for cell in cells(compared)],
        "comparisons": [compare(each, runs, on_cuda) for each in compared],
    }


SHARES = ("foreign_share", "idle_share")


def mean(runs: Sequence[Run], name: str) -> float:
    """The mean of a field of runs."""
    return float(np.mean([getattr(run, name) for run in runs]))


def row(cell: Cell, runs: Sequence[Run]) -> dict[str, Any]:
    """A cell: percentiles over the requests of all rounds together, and each round by itself."""
    return {
        "name": cell.name,
        "arm": cell.arm,
        "server": cell.server,
        "share": cell.share,
        "batch": cell.batch,
        "context": cell.context,
        "configurations": cell.configurations,
        "modality": cell.modality,
        TOKENS_PER_SECOND: mean(runs, TOKENS_PER_SECOND),
        **times(runs),
        "runs": [
            {
                TOKENS_PER_SECOND: run.tokens_per_second,
                **times([run]),
                "cached": run.cached,
                **{name: getattr(run, name) for name in SHARES},
            }
            for run in runs
        ],
    }


def times(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Percentiles of each time over all requests of some runs, in ms."""
    found = {}
    for name in TIMES:
        values = [seconds for run in runs for seconds in getattr(run, name)]
        cuts = 1000 * np.percentile(values, PERCENTILES)
        found[f"{name}_ms"] = {f"p{p}": float(c) for p, c in zip(PERCENTILES, cuts, strict=True)}
    return found


def by_round(metric: str, runs: Sequence[Run]) -> list[float]:
    """A metric of each round: tokens/s, or the median of a time in seconds."""
    if metric == TOKENS_PER_SECOND:
        return [run.tokens_per_second for run in runs]
    return [float(np.median(getattr(run, metric))) for run in runs]


def compare(comparison: Comparison, runs: Runs, on_cuda: bool = False) -> dict[str, Any]:
    """A ratio with its interval, and whether it reaches its bar unless the machine was too busy."""
    cell, reference = runs[comparison.cell], runs[comparison.reference]
    values = by_round(comparison.metric, cell)
    baseline = by_round(comparison.metric, reference)
    ratio = paired_ratio(values, baseline)
    foreign = 0.0 if on_cuda else max(mean(each, SHARES[0]) for each in (cell, reference))
    found = too_busy(foreign)
    if found is None and comparison.bar is not None:
        found = str(verdict(ratio, comparison.bar))
    return {
        **comparison.facts(),
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "bar": comparison.bar,
        "verdict": found,
    }


def table(result: Mapping[str, Any]) -> str:
    """The report for people."""
    heads = ("tokens/s", "TTFT", "TPOT", "ITL", "ITL p99", "E2E", "E2E p99", "cold E2E")
    head = " ".join(f"{each:>8}" for each in heads)
    width = max(len(each["name"]) for each in (*result["cells"], *result["comparisons"]))
    lines = ["", f"{'medians, ms':<{width}} {head}"]
    for each in result["cells"]:
        ttft, tpot, itl, e2e, cold = (each[f"{name}_ms"] for name in TIMES)
        lines.append(
            f"{each['name']:<{width}} {each[TOKENS_PER_SECOND]:>8.1f} {ttft['p50']:>8.1f} "
            f"{tpot['p50']:>8.1f} {itl['p50']:>8.1f} {itl['p99']:>8.1f} "
            f"{e2e['p50']:>8.1f} {e2e['p99']:>8.1f} {cold['p50']:>8.1f}"
        )
    lines += ["", f"{'ratio':<{width}} {'of':<8} {'ratio':>6} {'95 % interval':>15} {'bar':>5}"]
    lines[-1] += "  verdict"
    for each in result["comparisons"]:
        metric = METRICS[each["metric"]]
        interval = f"{each['low']:.3f} .. {each['high']:.3f}"
        bar = "" if each["bar"] is None else f"{each['bar']:.2f}"
        line = f"{each['name']:<{width}} {metric:<8} {each['ratio']:>6.3f} {interval:>15} {bar:>5}"
        lines.append(f"{line}  {each['verdict'] or ''}".rstrip())
    lines += [""]
    for name, used in result["memory"].items():
        lines.append(f"memory of {name}: {used['rss_mib']:.0f} MiB, peak {used['peak_mib']:.0f}")
    facts = result["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    lines += [f"{result['rounds']} rounds; {packages}; commit {facts['commit']}"]
    host = f"{facts['cpu']}, {facts['usable_threads']} threads"
    lines += [f"{result['model']}, {result['dtype']}; {facts['cuda_device'] or 'eager'}; {host}"]
    return "\n".join([*lines, *(f"warning: {each}" for each in result["warnings"])])
