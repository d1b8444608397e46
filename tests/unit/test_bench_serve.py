"""`headway bench serve` without servers: order, ratios, verdicts, report, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from headway.benchmarks import serve
from headway.benchmarks.quality.client import UnsteeredAnswer
from headway.benchmarks.serve_load import Load, Run
from headway.benchmarks.serve_matrix import (
    POINTS,
    QUICK_POINTS,
    Cell,
    cells,
    comparisons,
)
from headway.benchmarks.serve_report import compare, times
from headway.benchmarks.serve_servers import Order
from headway.steering import ModelGeometry

pytestmark = pytest.mark.unit

SMOLLM2 = ModelGeometry(30, 9, 3, 64, 576)
DEMO_VLM = replace(SMOLLM2, supports_images=True)
EVERY, QUICK = comparisons(POINTS), comparisons(QUICK_POINTS)
CELL_KEYS = {"name", "arm", "server", "share", "batch", "context", "configurations", "modality"}
CELL_KEYS |= {"tokens_per_second", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "cold_e2e_ms", "runs"}
COMPARISON_KEYS = {"name", "arm", "batch", "context", "configurations", "share", "modality"}
COMPARISON_KEYS |= {"baseline", "metric", "ratio", "low", "high", "bar", "verdict"}


# What follows


def made(tokens_per_second: float, **fields: Any) -> Run:
    second = 100 / tokens_per_second
    latencies = [0.1 * second, 0.2 * second, 0.9 * second]
    run = Run(100, second, *([list(latencies) for _ in range(5)]))
    return replace(run, **fields)


BASE = QUICK[0]  # idle / stock, tokens/s, with a bar


def test_ratios_are_taken_within_rounds() -> None:
    drift = [100.0, 95.0, 105.0]
    runs = {
        BASE.reference: [made(speed) for speed in drift],
        BASE.cell: [made(0.995 * speed) for speed in drift],
    }
    found = compare(BASE, runs)
    assert (found["ratio"], found["low"], found["high"]) == pytest.approx((0.995,) * 3)
    assert found.keys() == COMPARISON_KEYS and found["verdict"] == "holds"
    slower = compare(replace(BASE, metric="ttft", bar=None), runs)
    assert slower["ratio"] == pytest.approx(1 / 0.995)
    assert slower["bar"] is slower["verdict"] is None
    runs[BASE.cell] = [made(0.9 * speed) for speed in drift]
    assert compare(BASE, runs)["verdict"] == "fails"


def test_a_busy_machine_gets_no_verdict() -> None:
    quiet = [made(100.0)] * 2
    runs = {BASE.reference: quiet, BASE.cell: [made(100.0), made(100.0, foreign_share=0.5)]}
    assert "other processes used 25% of a core" in compare(BASE, runs)["verdict"]
    assert compare(BASE, runs, on_cuda=True)["verdict"] == "holds"
    # What slows both sides of a round is no noise, what slows one of them is.
    drift = {BASE.reference: [made(60.0), made(140.0)], BASE.cell: [made(60.0), made(140.0)]}
    assert compare(BASE, drift)["verdict"] == "holds"
    noise = {BASE.reference: [made(60.0), made(140.0)], BASE.cell: [made(140.0), made(60.0)]}
    assert compare(BASE, noise)["verdict"] == "too noisy to tell"


def test_a_cold_end_to_end_has_the_prompt_of_one_burst_and_the_tokens_of_the_other() -> None:
    run = made(100.0, ttft=[1.0, 3.0], e2e=[0.9, 0.8], warm_ttft=[0.1, 0.2])
    assert run.cold_e2e == pytest.approx([1.8, 3.6])
    assert times([run])["cold_e2e_ms"]["p50"] == pytest.approx(2700.0)
    (cold,) = (each for each in QUICK if each.metric == "cold_e2e" and each.name == BASE.name)
    twice = made(100.0, ttft=[2.8, 6.6], e2e=[0.9, 0.8], warm_ttft=[0.1, 0.2])
    assert compare(cold, {cold.reference: [run] * 2, cold.cell: [twice] * 2})[
        "ratio"
    ] == pytest.approx(2.0)


def test_percentiles_are_over_all_requests() -> None:
    found = times([made(100.0), made(100.0)])
    assert found["ttft_ms"]["p50"] == pytest.approx(200.0)
    assert found["e2e_ms"]["p99"] == pytest.approx(900.0)


# The command


class FakeServer:
    model, url, peak_mib = "m", "http://nowhere", 120.0

    def __init__(self, name: str) -> None:
        self.name = name

    def rss_mib(self) -> float:
        return 100.0 if self.name == "stock" else 110.0

    def cpu_seconds(self) -> float:
        return 0.0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that were run, in order, on servers that are not there."""
    found: list[Cell] = []

    @contextmanager
    def up(
        orders: Mapping[str, Order], flags: list[str], folder: Path, one_by_one: bool
    ) -> Iterator[dict[str, FakeServer]]:
        assert "--enforce-eager" in flags and not one_by_one
        for order in orders.values():
            assert bool(order.flags) == (order.program == "headway" and order.model.name == "text")
        yield {name: FakeServer(name) for name in orders}

    def run(load: Load) -> Run:
        assert load.server.name == serve.server_name(load.cell)  # type: ignore[attr-defined]
        assert len(load.specs) == load.cell.configurations
        found.append(load.cell)
        return made(90.0 if load.cell.share != "none" else 100.0)

    monkeypatch.setattr(serve, "serving", up)
    monkeypatch.setattr(serve, "geometry_of", lambda model: DEMO_VLM)
    monkeypatch.setattr(serve, "demo_vlm", lambda dtype: Path("pictures"))
    monkeypatch.setattr(serve, "busy_seconds", lambda: 0.0)
    monkeypatch.setattr(Load, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return found


def test_the_report_and_its_table(
    ran: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "serve.json"
    assert serve.main(["--model", "text", "--rounds", "3", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    expected = {"benchmark", "date", "environment", "model", "dtype", "seed", "rounds"}
    expected |= {"output_tokens", "warnings", "memory", "cells", "comparisons"}
    assert result.keys() == expected and result["benchmark"] == "serve"
    assert all(each.keys() == CELL_KEYS and len(each["runs"]) == 3 for each in result["cells"])
    assert all(each.keys() == COMPARISON_KEYS for each in result["comparisons"])
    names = ["stock", "headway", "stock, image", "headway, image"]
    assert list(result["memory"]) == names
    assert result["memory"]["headway"] == {"rss_mib": 110.0, "peak_mib": 120.0}
    (row,) = (
        each
        for each in result["comparisons"]
        if each["name"] == "affine / idle, 16 at once, context 512"
        and each["metric"] == "tokens_per_second"
    )
    assert (row["ratio"], row["bar"], row["verdict"]) == (pytest.approx(0.9), 0.97, "fails")
    printed = capsys.readouterr().out
    assert "memory of headway, image: 110 MiB, peak 120" in printed
    count = len(cells(EVERY))
    rounds = [ran[at : at + count] for at in range(0, len(ran), count)]
    assert len(rounds) == 4 and all(set(each) == set(cells(EVERY)) for each in rounds)
    assert rounds[1] != rounds[2]


def test_a_cache_that_is_too_small_is_told_of(
    ran: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Load, "run", lambda load: made(1.0, cached=float(load.cell.batch > 4)))
    output = tmp_path / "serve.json"
    assert serve.main(["--quick", "--model", "text", "--output", str(output)]) == 0
    (warning,) = json.loads(output.read_text())["warnings"]
    assert "affine, 4 at once" in warning and "16 at once" not in warning


def test_an_unsteered_answer_ends_it(
    ran: list[Cell],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(load: Load) -> Run:
        raise UnsteeredAnswer("request 3 had no position edited")

    monkeypatch.setattr(Load, "run", run)
    output = tmp_path / "serve.json"
    assert serve.main(["--quick", "--model", "text", "--output", str(output)]) == 1
    assert "no position edited" in capsys.readouterr().err and not output.exists()


def test_nothing_is_timed_under_the_interpreter(
    ran: list[Cell], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert serve.main(["--quick"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err and ran == []


def test_a_server_that_is_gone_is_an_error(
    ran: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(load: Load) -> Run:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(Load, "run", run)
    assert serve.main(["--quick", "--model", "text", "--output", str(tmp_path / "x.json")]) == 1
