"""`headway bench overhead` without engines: statistics, verdicts, order of runs, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.benchmarks import overhead
from headway.benchmarks.engine import EngineError
from headway.benchmarks.scenarios import COMPARISONS, SCENARIOS, STEERING, Scenario
from headway.benchmarks.statistics import Ratio, Verdict, paired_ratio, verdict
from headway.steering import ModelGeometry, SteeringProgram, compile_spec, parse_spec
from headway.steering.program import Feature

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(30, 9, 3, 64, 576)
SPEED = {"stock": 200.0, "idle": 199.0, "affine": 180.0}
SPEED |= {each.name: 100.0 for each in SCENARIOS if each.cached}


class FakeEngine:
    """Serves at made-up speeds, and remembers what was run on it."""

    started: list[FakeEngine] = []
    runs: list[str] = []

    def __init__(self, scenarios: list[Scenario], model: Path, log: Path) -> None:
        self.names = [scenario.name for scenario in scenarios]
        self.closed = False
        self.started.append(self)

    def ready(self) -> dict[str, Any]:
        return {name: {"programs": 0} for name in self.names}

    def run(self, name: str) -> dict[str, float]:
        assert name in self.names
        self.runs.append(name)
        seconds = 1024 / SPEED[name]
        return {"tokens": 1024, "seconds": seconds, "cpu_seconds": 2 * seconds}

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "started", [])
    monkeypatch.setattr(FakeEngine, "runs", [])
    monkeypatch.setattr(overhead, "Engine", FakeEngine)
    return FakeEngine


def test_a_ratio_is_paired_by_round() -> None:
    baseline = np.array([100.0, 50.0, 10.0, 200.0])  # a machine whose speed drifts
    ratio = paired_ratio(list(baseline * 0.98), list(baseline))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.98, 0.98, 0.98))
    assert ratio.rounds == 4


def test_the_interval_surrounds_the_mean_and_narrows_with_rounds() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, 400))
    few = paired_ratio(list(noise[:6]), [1.0] * 6)
    many = paired_ratio(list(noise), [1.0] * 400)
    assert few.low < few.value < few.high
    assert many.high - many.low == pytest.approx(4 * 0.01 / 20, rel=0.2)
    assert many.high - many.low < few.high - few.low
    assert few == paired_ratio(list(noise[:6]), [1.0] * 6)


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (0, 0)])
def test_an_interval_needs_two_paired_rounds(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="two rounds"):
        paired_ratio([1.0] * counts[0], [1.0] * counts[1])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.99, 1.01, Verdict.HOLDS),
        (0.97, 0.989, Verdict.FAILS),
        (0.98, 1.0, Verdict.UNKNOWN),
        (0.97, 0.99, Verdict.UNKNOWN),
        (0.99, 1.04, Verdict.WIDE),
        (0.90, 0.95, Verdict.WIDE),
        (float("nan"), float("nan"), Verdict.WIDE),
    ],
)
def test_verdicts(low: float, high: float, expected: Verdict) -> None:
    assert verdict(Ratio((low + high) / 2, low, high, 6), 0.99) == expected


def test_every_request_has_its_own_program_on_every_layer() -> None:
    specs = [STEERING["affine"](GEOMETRY, index) for index in range(16)]
    programs = [compile_spec(parse_spec(spec), GEOMETRY) for spec in specs]
    assert len({program.fingerprint for program in programs}) == 16
    for spec in specs:
        assert {scale[0] for scale in spec["methods"][0]["scales"]} == set(range(30))


@pytest.mark.parametrize("name", ["locore", "redistribution"])
def test_attention_edits_differ_by_configuration(name: str) -> None:
    specs = [STEERING[name](GEOMETRY, index) for index in range(16)]
    programs = [
        spec if isinstance(spec, SteeringProgram) else compile_spec(parse_spec(spec), GEOMETRY)
        for spec in specs
    ]
    assert len({program.fingerprint for program in programs}) == 16
    assert all(program.features == {Feature.ATTENTION_EDIT} for program in programs)


def test_every_comparison_is_of_scenarios_that_are_run() -> None:
    names = {scenario.name for scenario in SCENARIOS}
    assert {name for each in COMPARISONS for name in (each.scenario, each.baseline)} == names


def test_two_engines_and_every_round_runs_each_load_once(engines: type[FakeEngine]) -> None:
    _, measurement = overhead.measure(SCENARIOS, Path("m"), rounds=20, seed=1)
    assert [engine.names for engine in engines.started] == [["stock"], [*SPEED][1:]]
    assert all(engine.closed for engine in engines.started)
    count = len(SPEED)
    rounds = [tuple(engines.runs[at : at + count]) for at in range(count, len(engines.runs), count)]
    assert len(rounds) == 20
    assert all(sorted(names) == sorted(SPEED) for names in rounds)
    assert len(set(rounds)) > 1
    assert measurement.tokens_per_second("stock") == pytest.approx([200.0] * 20)


def test_the_report_and_its_table(
    engines: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "report.json"
    arguments = ["--rounds", "3", "--model", str(tmp_path / "tiny"), "--output", str(output)]
    assert overhead.main(arguments) == 0  # although a bar is missed
    report = json.loads(output.read_text())
    assert report["model"] == "tiny"
    assert {"python", "packages", "cpu", "cores", "threads", "commit"} <= set(report["environment"])
    assert [row["name"] for row in report["scenarios"]] == list(SPEED)
    assert all(len(row["runs"]) == 3 for row in report["scenarios"])
    assert [row["bar"] for row in report["comparisons"]] == [each.bar for each in COMPARISONS]
    verdicts = [row["verdict"] for row in report["comparisons"]]
    assert verdicts[:2] == ["holds", "fails"] and set(verdicts[2:]) == {"holds"}
    assert report["comparisons"][0]["ratio"] == pytest.approx(199 / 200)
    printed = capsys.readouterr().out
    assert "stock" in printed and "0.995" in printed and "fails" in printed


def test_an_engine_that_ends_is_an_error(
    engines: type[FakeEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ready(engine: FakeEngine) -> dict[str, Any]:
        raise EngineError("the end of its log: no memory")

    monkeypatch.setattr(FakeEngine, "ready", ready)
    assert overhead.main(["--model", str(tmp_path)]) == 1
    assert "no memory" in capsys.readouterr().err
    assert all(engine.closed for engine in engines.started)
