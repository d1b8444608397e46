"""`headway bench sgrs` without a server: ratios, verdicts, order, report, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.benchmarks import environment, sgrs
from headway.benchmarks import options as options_module
from headway.benchmarks.completions import Completion
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.scenarios import SCENARIOS, available
from headway.benchmarks.sgrs import BARS, PUBLISHED, Measurement
from headway.benchmarks.sgrs_load import (
    BATCH,
    READ,
    SGRS,
    SGRS_BATCH,
    UNSTEERED,
    UNSTEERED_BATCH,
    Arm,
    Judged,
)
from headway.benchmarks.statistics import Ratio, Verdict, verdict
from headway.server.launch import LaunchError

pytestmark = pytest.mark.unit

MILLISECONDS = {
    UNSTEERED.name: 30.0,
    SGRS.name: 60.0,
    READ.name: 45.0,
    UNSTEERED_BATCH.name: 50.0,
    SGRS_BATCH.name: 150.0,
}
EVALUATION, DRAWS = 4.0, 1.25


# What follows


@pytest.mark.parametrize(
    ("low", "high", "bar", "at_most", "expected"),
    [
        (1.9, 2.3, 2.5, True, Verdict.HOLDS),
        (2.4, 2.6, 2.5, True, Verdict.UNKNOWN),
        (2.6, 3.1, 2.5, True, Verdict.FAILS),
        (101.0, 140.0, 100.0, False, Verdict.HOLDS),
        (90.0, 110.0, 100.0, False, Verdict.UNKNOWN),
        (80.0, 99.0, 100.0, False, Verdict.FAILS),
    ],
)
def test_only_the_side_of_the_bar_counts(
    low: float, high: float, bar: float, at_most: bool, expected: Verdict
) -> None:
    ratio = Ratio((low + high) / 2, low, high, 6)
    assert verdict(ratio, bar, at_most) == expected


def test_the_published_procedure_costs_an_evaluation_for_every_draw() -> None:
    measurement = Measurement(draws=[1.0, 1.5], evaluations=[4.0, 6.0])
    measurement.seconds[SGRS.name] = [0.05, 0.06]
    assert measurement.per_token(PUBLISHED) == [4.0, 9.0]
    row = sgrs.compare(BARS[2], measurement)
    assert row["value"] == pytest.approx((80 * 150) ** 0.5)
    assert row["low"] < 80 and row["high"] > 150 and not row["at_most"]  # of two rounds


def gated(draws: int, **fields: Any) -> dict[str, Any]:
    return {"methods": [{"method": "sgrs", "draws": draws, "layers": [6, 7, 8]}], **fields}


class FakeRequests:
    """Serves at made-up speeds, each time 1 % slower than before, and remembers what was asked."""

    asked: list[str] = []
    slower = 1.0

    def __init__(self, url: str, model: Path, context: int, output_tokens: int, seed: int) -> None:
        assert url == "http://served"
        self.context, self.output_tokens = context, output_tokens

    def run(self, arm: Arm, round_index: int) -> list[Completion]:
        FakeRequests.asked.append(arm.name)
        FakeRequests.slower *= 1.01
        number = self.output_tokens
        seconds = MILLISECONDS[arm.name] / 1000 * self.slower * (number - 1)
        steering = gated(int(DRAWS * number)) if arm.judges else None
        return [Completion([1] * number, 1, seconds, steering)] * arm.num_requests

    def judged(self) -> Judged:
        return Judged([1] * self.context, self.context - 16, 7, [6, 7, 8], 0.1)


class FakePublished:
    """Takes as long as everything does now."""

    saliency = 0.1005

    closed = 0

    def __init__(self, path: Path, dtype: str) -> None:
        assert dtype == "float32"

    def close(self) -> None:
        FakePublished.closed += 1

    def timed(self, context: list[int], *_: Any) -> tuple[float, float]:
        FakeRequests.asked.append(PUBLISHED)
        return self.saliency, EVALUATION * FakeRequests.slower


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The flags of every server that is started."""
    started: list[list[str]] = []

    @contextmanager
    def serve(
        model: Path, flags: list[str], folder: Path, log: Path, settings: dict[str, str]
    ) -> Iterator[str]:
        started.append(flags)
        log.write_text("served")
        yield "http://served"

    monkeypatch.setattr(FakeRequests, "asked", [])
    monkeypatch.setattr(FakeRequests, "slower", 1.0)
    monkeypatch.setattr(sgrs, "serve", serve)
    monkeypatch.setattr(sgrs, "Requests", FakeRequests)
    monkeypatch.setattr(FakePublished, "closed", 0)
    monkeypatch.setattr(sgrs, "PublishedProcess", FakePublished)
    monkeypatch.setattr(options_module, "has_native_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return started


def arguments(folder: Path, *options: str) -> list[str]:
    return ["--dtype", "float32", "--output", str(folder / "new" / "report.json"), *options]


def test_the_report_and_its_table(
    server: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sgrs.main(arguments(tmp_path, "--quick")) == 0  # although a bar is missed
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert {"python", "packages", "cpu", "cores", "threads", "commit"} <= set(report["environment"])
    assert (report["benchmark"], report["dtype"], report["context"]) == ("sgrs", "float32", 600)
    assert report["model"] == "smollm2-135m-instruct" and report["rounds"] == sgrs.QUICK_ROUNDS
    assert [row["name"] for row in report["arms"]] == [*MILLISECONDS, PUBLISHED]
    assert {len(row["runs"]) for row in report["arms"]} == {sgrs.QUICK_ROUNDS}
    rows = report["comparisons"]
    # Each serves 1 % slower than the one before, in random order.
    values = [row["value"] for row in rows]
    assert values == pytest.approx([2.0, 3.0, EVALUATION * DRAWS / 0.06, 1.5], rel=0.03)
    assert [row["bar"] for row in rows] == [2.5, 2.5, 100.0, None]
    assert [row["verdict"] for row in rows] == ["holds", "fails", "fails", None]
    assert set(report["draws_per_token"]) == {DRAWS}
    for settings in (report["engine_settings"], report["published_settings"]):
        assert "MALLOC_TRIM_THRESHOLD_" in settings
    assert FakePublished.closed == 1
    assert report["saliency"] == {"headway": 0.1, PUBLISHED: 0.1005}
    assert not any("saliency" in warning for warning in report["warnings"])
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "<= 2.5  holds" in lines["SGRS / unsteered, alone"]
    assert "<= 2.5  fails" in lines[f"SGRS / unsteered, {BATCH} together"]
    assert ">= 100.0  fails" in lines["published procedure / SGRS, alone"]
    assert lines["saliencies read / unsteered, alone"].endswith("control")
    assert "1.25 drawn for a token" in printed and "mean context 600" in printed


def test_a_server_takes_the_batch_in_one_step(server: list[list[str]], tmp_path: Path) -> None:
    assert sgrs.main(arguments(tmp_path, "--quick", "--rounds", "2", "--context", "300")) == 0
    (flags,) = server
    given = dict(zip(flags[::2], flags[1::2], strict=False))
    named = [flags[flags.index(name) + 1] for name in ("--max-num-seqs", "--max-sgrs-requests")]
    assert named == [str(BATCH)] * 2 and given["--dtype"] == "float32"
    longest = int(flags[flags.index("--max-model-len") + 1])
    assert longest >= 300 + sgrs.QUICK_OUTPUT_TOKENS // 2
    assert int(flags[flags.index("--max-num-batched-tokens") + 1]) == BATCH * longest


def test_everything_runs_once_a_round_in_random_order(
    server: list[list[str]], tmp_path: Path
) -> None:
    assert sgrs.main(arguments(tmp_path, "--rounds", "20")) == 0
    names = [*MILLISECONDS, PUBLISHED]
    asked = FakeRequests.asked[-20 * len(names) :]
    rounds = [tuple(asked[at : at + len(names)]) for at in range(0, len(asked), len(names))]
    assert all(sorted(each) == sorted(names) for each in rounds) and len(set(rounds)) > 5


def test_another_saliency_is_told_of(
    server: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakePublished, "saliency", 0.2)
    assert sgrs.main(arguments(tmp_path, "--quick")) == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert "the saliency of a token is 0.10000, as published 0.20000" in report["warnings"]


@pytest.mark.parametrize("error", [EndpointError("dead"), LaunchError("dead"), OSError("dead")])
def test_an_error_names_the_log(
    error: Exception,
    server: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(FakeRequests, "run", fails)
    assert sgrs.main(arguments(tmp_path)) == 1
    said = capsys.readouterr().err
    assert FakePublished.closed == 1
    assert "dead" in said and not (tmp_path / "new" / "report.json").exists()
    assert isinstance(error, OSError) or f"see {tmp_path / 'new' / 'report.log'}" in said


def test_a_server_that_does_not_end_well_takes_no_result_along(
    server: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def serve(*_: Any) -> Iterator[str]:
        yield "http://served"
        raise LaunchError("the server ended with exit code 1")

    monkeypatch.setattr(sgrs, "serve", serve)
    assert sgrs.main(arguments(tmp_path, "--quick")) == 0
    assert "exit code 1" in capsys.readouterr().err
    assert (tmp_path / "new" / "report.json").exists()


def test_nothing_is_measured_under_the_interpreter(
    server: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert sgrs.main([]) == 2
    assert "no measurements" in capsys.readouterr().err and server == []


def test_a_cuda_device_is_refused(
    server: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Small")
    assert sgrs.main([]) == 2
    assert "CUDA" in capsys.readouterr().err and server == []


@pytest.mark.parametrize(
    "options", [["--rounds", "1"], ["--dtype", "half"], ["--context", "64"], ["--context", "x"]]
)
def test_wrong_options(options: list[str], server: list[list[str]]) -> None:
    with pytest.raises(SystemExit) as ended:
        sgrs.main(options)
    assert ended.value.code == 2 and server == []


def test_cpu_time_of_others_is_told_of() -> None:
    assert environment.cpu_warnings(0.05, 0.01) == []
    (foreign,) = environment.cpu_warnings(0.3)
    (idle,) = environment.cpu_warnings(0.0, 0.5)
    assert "other processes used 30% of a core" in foreign
    assert "waiting engines used 50% of a core" in idle
    assert environment.own_seconds() > 0


# The row of `headway bench overhead`


def test_sgrs_is_left_out_where_it_is_refused() -> None:
    on_cpu, compared = available(on_cuda=False)
    assert on_cpu == SCENARIOS
    (row,) = (each for each in compared if "SGRS" in each.name)
    (gated,) = (each for each in on_cpu if each.name == row.scenario)
    assert row.bar == 0.40 and gated.num_requests <= 8 and gated.steering == "sgrs"
    on_cuda, rest = available(on_cuda=True)
    left_out = {each.name for each in on_cpu} - {each.name for each in on_cuda}
    assert left_out >= {row.scenario, row.baseline}
    assert row not in rest and {each.name for each in on_cuda if "SGRS" in each.name} == set()
