"""`headway bench overhead` without engines: statistics, verdicts, order of runs, device, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from headway.benchmarks import engine, environment, overhead, worker
from headway.benchmarks import options as options_module
from headway.benchmarks import scenarios as scenarios_module
from headway.benchmarks.engine import EngineError
from headway.benchmarks.scenarios import COMPARISONS, SCENARIOS, STEERING, Scenario, sized
from headway.benchmarks.statistics import Ratio, Verdict, paired_ratio, verdict
from headway.steering import ModelGeometry, SteeringProgram, compile_spec, parse_spec
from headway.steering.program import Feature
from headway.steering.sinks import SinkProfile

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(30, 9, 3, 64, 576)
SPEED = {"stock": 200.0, "idle": 199.0, "affine": 180.0}
SPEED |= {each.name: 198.0 for each in SCENARIOS if each.name.startswith("G-ACT")}
SPEED |= {each.name: 100.0 for each in SCENARIOS if each.cached}


class FakeEngine:
    """Serves at made-up speeds, and remembers what was run on it."""

    started: list[FakeEngine] = []
    runs: list[str] = []
    prompts_cached = 0.998

    def __init__(
        self, scenarios: list[Scenario], model: Path, log: Path, memory: float | None
    ) -> None:
        self.names = [scenario.name for scenario in scenarios]
        self.scenarios, self.model, self.memory = scenarios, model, memory
        self.closed = False
        self.started.append(self)

    def ready(self) -> dict[str, Any]:
        return {name: {"programs": 0} for name in self.names}

    def run(self, name: str) -> dict[str, float]:
        assert name in self.names
        self.runs.append(name)
        seconds = 1024 / SPEED[name]
        return {
            "tokens": 1024,
            "seconds": seconds,
            "cpu_seconds": 2 * seconds,
            "prompts_cached": self.prompts_cached,
        }

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "started", [])
    monkeypatch.setattr(FakeEngine, "runs", [])
    monkeypatch.setattr(overhead, "Engine", FakeEngine)
    monkeypatch.setattr(overhead.Watch, "shares", lambda watch: (0.0, 0.0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return FakeEngine


@pytest.fixture
def cuda(engines: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """A machine with a CUDA device, and other processes on its cores."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Small")
    monkeypatch.setattr(options_module, "has_native_bfloat16", lambda: False)
    monkeypatch.setattr(overhead.Watch, "shares", lambda watch: (0.5, 3.0))
    return engines


def run(output: Path, *options: str) -> dict[str, Any]:
    """The report of a run of two rounds."""
    assert overhead.main(["--rounds", "2", "--output", str(output), *options]) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    return report


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


def test_the_interval_of_three_rounds_holds_the_truth_as_often_as_it_says() -> None:
    drawn = np.exp(np.random.default_rng(0).normal(0, 0.01, (2000, 3)))
    found = [paired_ratio(list(rounds), [1.0] * 3) for rounds in drawn]
    assert 0.93 < np.mean([each.low <= 1.0 <= each.high for each in found]) < 0.97


def test_the_interval_of_two_rounds_is_that_of_student() -> None:
    found = paired_ratio([1.0, np.exp(0.02)], [1.0, 1.0])
    half = 12.706 * 0.01  # t at 1 degree of freedom, times half the difference
    assert np.log([found.low, found.value, found.high]) == pytest.approx(
        [0.01 - half, 0.01, 0.01 + half], rel=1e-3
    )


def test_rounds_that_are_all_alike_have_an_interval_of_nothing() -> None:
    found = paired_ratio([0.7] * 5, [0.3] * 5)
    assert found.low == found.value == found.high


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
        (0.99, 1.40, Verdict.HOLDS),
        (0.50, 0.98, Verdict.FAILS),
        (float("nan"), float("nan"), Verdict.UNKNOWN),
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
    _, measurement = overhead.measure(SCENARIOS, COMPARISONS, Path("m"), rounds=20, seed=1)
    assert [engine.names for engine in engines.started] == [["stock"], [*SPEED][1:]]
    assert all(engine.closed for engine in engines.started)
    count = len(SPEED)
    rounds = [tuple(engines.runs[at : at + count]) for at in range(count, len(engines.runs), count)]
    assert len(rounds) == 20
    assert all(sorted(names) == sorted(SPEED) for names in rounds)
    assert len(set(rounds)) > 1
    for names in rounds:  # what is compared runs close together
        at = names.index("SGRS, 8 requests"), names.index("idle, 8 requests")
        assert abs(at[0] - at[1]) == 1
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


def test_a_busy_machine_gets_no_verdict(
    engines: type[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead.Watch, "shares", lambda watch: (0.0, 0.5))
    report = run(tmp_path / "report.json", "--model", str(tmp_path))
    found = {row["verdict"] for row in report["comparisons"]}
    assert found == {"too noisy, other processes used 50% of a core"}


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


# The device


def test_on_cuda_engines_share_the_device_and_capture_graphs(
    cuda: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tmp_path / "report.json", "--model", str(tmp_path / "tiny"))
    assert [each.memory for each in cuda.started] == [engine.DEVICE_MEMORY / 2] * 2
    for each in (scenario for started in cuda.started for scenario in started.scenarios):
        assert (each.dtype, each.enforce_eager) == ("bfloat16", False)
    assert report["environment"]["cuda_device"] == "NVIDIA Small"
    assert not any(name.startswith("VLLM_CPU") for name in report["engine_settings"])
    assert report["warnings"] == []  # what uses the cores is no matter
    printed = capsys.readouterr().out
    assert "measured on NVIDIA Small, bfloat16, CUDA graphs" in printed
    assert "CPU time" not in printed


def test_on_cpu_engines_are_eager_and_cores_are_watched(
    engines: type[FakeEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options_module, "has_native_bfloat16", lambda: False)
    monkeypatch.setattr(overhead.Watch, "shares", lambda watch: (0.5, 3.0))
    report = run(tmp_path / "report.json", "--model", str(tmp_path / "tiny"))
    assert [each.memory for each in engines.started] == [None, None]
    for each in (scenario for started in engines.started for scenario in started.scenarios):
        assert (each.dtype, each.enforce_eager) == ("float32", True)
    assert report["environment"]["cuda_device"] is None
    assert report["engine_settings"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert len(report["warnings"]) == 2
    printed = capsys.readouterr().out
    assert "measured on" not in printed and "CPU time" in printed


def test_what_the_caller_sets_is_what_a_server_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    found = engine.server_settings()
    assert found.keys() == engine.SERVER_SETTINGS.keys()
    assert found["MALLOC_TRIM_THRESHOLD_"] == "7"


def test_a_cache_too_small_for_the_prompts_is_told_of(
    cuda: type[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "prompts_cached", 0.5)
    (warning,) = run(tmp_path / "report.json", "--model", str(tmp_path))["warnings"]
    assert "KV cache is too small" in warning and "LocoRE, context 4096" in warning
    assert "affine" not in warning


def test_a_model_is_found_from_the_folder_of_the_engines(
    engines: type[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "report.json", "--model", "7b")["model"] == "7b"
    assert {each.model for each in engines.started} == {tmp_path / "7b"}


@pytest.mark.parametrize("device", ["cuda", "engines"])
def test_nothing_is_measured_under_the_interpreter(
    device: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = request.getfixturevalue(device).started
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert overhead.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "TRITON_INTERPRET is set" in line and "no measurements" in line
    assert started == []


def test_an_interpreter_that_is_switched_off_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert environment.interpreter_refusal() is None


def test_an_engine_takes_its_share_of_the_device_and_of_nothing_else() -> None:
    stock, idle = SCENARIOS[0], sized(SCENARIOS, "bfloat16", 64, enforce_eager=False)
    on_cpu, on_cuda = worker.options([stock], None), worker.options(idle, 0.45)
    assert "gpu_memory_utilization" not in on_cpu and on_cpu["enforce_eager"] is True
    assert on_cuda["gpu_memory_utilization"] == 0.45 and on_cuda["enforce_eager"] is False
    assert on_cuda["max_model_len"] == 4097 + 16 + 16
    assert engine.settings(on_cuda=False).items() > engine.settings(on_cuda=True).items()


def test_an_engine_process_is_told_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    started: dict[str, Any] = {}

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **streams: Any) -> None:
            started["env"] = env
            self.stdin = (tmp_path / "sent").open("w")

    monkeypatch.setattr(engine.subprocess, "Popen", Process)
    engine.Engine(SCENARIOS[:1], tmp_path, tmp_path / "log", 0.45).process.stdin.close()
    assert json.loads((tmp_path / "sent").read_text())["memory"] == 0.45
    assert "VLLM_CPU_KVCACHE_SPACE" not in started["env"]


def test_a_profile_has_the_sink_dimensions_of_the_scenarios(tmp_path: Path) -> None:
    worker.sink_profile(GEOMETRY).save(tmp_path / "sinks.json")
    profile = SinkProfile.load(tmp_path / "sinks.json")
    profile.check_model(GEOMETRY)
    program = STEERING["redistribution"](GEOMETRY, 0)
    assert isinstance(program, SteeringProgram) and program.sink_rule is not None
    assert (profile.dims, profile.tau) == (program.sink_rule.dims, program.sink_rule.tau)


@pytest.mark.parametrize(("is_cuda", "memory"), [(False, 0.45), (True, None)])
def test_vllm_must_run_on_the_device_that_is_reported(
    is_cuda: bool, memory: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "cuda" if is_cuda else "cpu"
    platform = SimpleNamespace(is_cuda=lambda: is_cuda, device_type=kind)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=None))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    with pytest.raises(RuntimeError, match=f"vLLM runs on {kind} here"):
        worker.start(SCENARIOS[:1], "m", memory)


class FakeLlm:
    """Answers every request with so many tokens, as an engine with CUDA graphs of this mode."""

    def __init__(self, tokens: int, mode: str) -> None:
        self.tokens = tokens
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(worker_cls="vllm.v1.worker.gpu_worker.Worker"),
            compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=mode)),
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(vocab_size=100)

    def generate(self, prompts: list[dict[str, Any]], *args: Any, **kwargs: Any) -> list[Any]:
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                num_cached_tokens=len(prompt["prompt_token_ids"]) // 2,
                outputs=[SimpleNamespace(token_ids=[0] * self.tokens)],
            )
            for prompt in prompts
        ]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., worker.Load]:
    """The stock load on a fake engine."""
    vllm = SimpleNamespace(SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name in [name for name in sys.modules if name.startswith("headway.server")]:
        monkeypatch.delitem(sys.modules, name)
    stock, *_ = sized(SCENARIOS[:1], "bfloat16", 64, enforce_eager=False)
    return lambda tokens=32, mode="FULL": worker.Load(stock, FakeLlm(tokens, mode))


def test_a_run_says_how_much_of_the_prompts_was_cached(load: Callable[..., worker.Load]) -> None:
    result = load().run()
    assert (result["tokens"], result["prompts_cached"]) == (16 * 32, 0.5)


def test_cached_prompts_are_served_once_before_they_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Params(SimpleNamespace):
        def clone(self) -> Params:
            return Params(**vars(self))

    asked: list[tuple[list[dict[str, Any]], int]] = []

    class Llm(FakeLlm):
        def generate(self, prompts: Any, params: Any, **options: Any) -> list[Any]:
            asked.append((prompts, params.max_tokens))
            self.tokens = params.max_tokens
            return super().generate(prompts)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=Params))
    scenarios = sized(SCENARIOS, "float32", 64, enforce_eager=True)
    (cached,) = [each for each in scenarios if each.name == "idle, context 512"]
    (idle,) = [each for each in scenarios if each.name == "idle"]
    assert worker.Load(cached, Llm(0, "NONE")).run()["tokens"] == 16 * 16
    (first, one), (second, full) = asked
    assert first == second and (one, full) == (1, 16)
    asked.clear()
    worker.Load(idle, Llm(0, "NONE")).run()
    assert [tokens for _, tokens in asked] == [32]


def test_an_output_that_ends_early_is_no_measurement(load: Callable[..., worker.Load]) -> None:
    with pytest.raises(RuntimeError, match="only 496 tokens"):
        load(tokens=31).run()


def test_an_engine_without_the_graphs_it_should_have_is_refused(
    load: Callable[..., worker.Load],
) -> None:
    assert load(mode="PIECEWISE").verify()["cudagraph_mode"] == "PIECEWISE"
    with pytest.raises(RuntimeError, match="no CUDA graphs"):
        load(mode="NONE").verify()


def test_some_of_the_comparisons() -> None:
    chosen, compared = scenarios_module.selected(SCENARIOS, COMPARISONS, "g-act")
    assert len(compared) == 3 and all("G-ACT" in each.name for each in compared)
    assert {each.name for each in chosen} == {
        *("idle", "G-ACT, 4 layers", "G-ACT, all layers", "G-ACT, 1 profile")
    }
    with pytest.raises(ValueError, match='no comparison has "x-y".*affine on every request'):
        scenarios_module.selected(SCENARIOS, COMPARISONS, "x-y")


def test_a_quick_run_has_one_comparison_of_every_kind(engines: type[FakeEngine], tmp_path: Path):
    result = run(tmp_path / "quick.json", "--quick")
    assert [row["name"] for row in result["comparisons"]] == list(scenarios_module.QUICK)
    for row in result["scenarios"]:
        assert row["output_tokens"] <= 16 and max(row["num_prompts"], row["configurations"]) <= 4
    assert {row["name"] for row in result["scenarios"]} == {
        row[side] for row in result["comparisons"] for side in ("scenario", "baseline")
    }
