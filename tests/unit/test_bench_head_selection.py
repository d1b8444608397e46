"""`headway bench head-selection` without an engine: options, questions, order, ratios, verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from headway.benchmarks import head_selection
from headway.benchmarks.head_selection import AUTO, BARS, BATCHES, COLD, EXPLICIT, UNSTEERED, WARM
from headway.benchmarks.image_questions import (
    OUTPUT_TOKENS,
    Condition,
    ImageEngine,
    Timing,
    questions,
)
from headway.benchmarks.statistics import Ratio, Verdict, paired_median, verdict
from headway.server.engine.report import EngineReport
from headway.server.models.smollm2 import ensure_smollm2
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.head_words import HeadField

pytestmark = pytest.mark.unit

DEMO = ModelGeometry(30, 9, 3, 64, 576, supports_images=True)
HEADS = [[1, 0], [1, 4], [14, 8]]
SECONDS = {UNSTEERED.name: 0.2, COLD.name: 0.25, WARM.name: 0.22, EXPLICIT: 0.2}
SPEED = dict(zip([each.name for each in BATCHES], [200.0, 197.0], strict=True))


class FakeEngine:
    """Serves at made-up speeds, each time 1 % slower than before, and remembers what was asked."""

    asked: list[str] = []

    def __init__(self, model: Path, seed: int) -> None:
        self.new_texts = ["text"] * 1000
        self.prompt_tokens = 53
        self.config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32),
            cache_config=SimpleNamespace(block_size=128),
        )
        self.slower = 1.0

    def first_token(self, condition: Condition) -> tuple[Timing, EngineReport | None]:
        self.asked.append(condition.name)
        self.slower *= 1.01
        seconds = SECONDS.get(condition.name, 9.0) * self.slower
        report = EngineReport(heads=HEADS) if condition.chooses else None
        return Timing(1, seconds, 1.5 * seconds), report

    def decode(self, condition: Condition, output_tokens: int = OUTPUT_TOKENS) -> Timing:
        self.asked.append("batch")
        return Timing(1008, 1008 / SPEED[condition.name], 1008 / 150)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(FakeEngine, "asked", [])
    monkeypatch.setattr(head_selection, "ImageEngine", FakeEngine)
    monkeypatch.setattr(head_selection, "settings", lambda on_cuda: {})
    monkeypatch.setattr("headway.server.models.demo_vlm.ensure_demo_vlm", lambda: Path("demo"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "headway")
    return FakeEngine


# Questions


def split(text: str) -> list[int]:
    """A token for every word, two for a long one."""
    return [index for word in text.split() for index in range(1 + (len(word) > 5))]


def test_questions_are_of_equal_length_and_all_different() -> None:
    tokenizer = Tokenizer.from_file(str(ensure_smollm2() / "tokenizer.json"))

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    texts = questions(tokenize)
    assert len(set(texts)) == len(texts)
    assert {len(tokenize(text)) for text in texts} == {9}
    # Twice as many as the longest run takes that is offered.
    assert len(texts) > 2 * 3 * head_selection.ROUNDS * head_selection.ASKED
    assert texts == questions(tokenize) and texts != questions(tokenize, seed=1)


def test_a_word_of_several_tokens_is_left_out() -> None:
    texts = questions(split)
    assert {len(split(text)) for text in texts} == {9}
    assert "Is there a red fork in the image?" in texts
    assert "Is there a red flower in the image?" not in texts
    assert "Is there a wooden fork in the image?" not in texts


# What is asked


def test_conditions_differ_in_what_they_say() -> None:
    unsteered, cold, warm, explicit = head_selection.conditions(HEADS)
    assert unsteered.steering is None and (cold.passes, warm.passes) == (1, 0)
    assert (cold.is_known, warm.is_known, explicit.is_known) == (False, True, False)
    assert cold.chooses and warm.chooses and not explicit.chooses and not unsteered.chooses
    chosen = compile_spec(parse_spec(AUTO), DEMO).head_selection
    assert chosen is not None and chosen.layers == (1, *range(17, 30))
    named = compile_spec(parse_spec(explicit.steering), DEMO)
    (edit,) = named.head_edits
    scaled = np.argwhere(edit.words.table[..., HeadField.SCALE] != 1.0)
    assert named.head_selection is None and scaled.tolist() == HEADS


def test_every_bar_is_about_what_is_measured(engine: type[FakeEngine]) -> None:
    _, measurement = head_selection.run(2, seed=0)
    for bar in BARS:
        times = measurement.first_token if bar.at_most else measurement.decode
        assert bar.condition in times and UNSTEERED.name in times


def test_neighbours_are_compared_in_random_order(engine: type[FakeEngine]) -> None:
    _, measurement = head_selection.run(3, seed=0)
    assert {len(times) for times in measurement.first_token.values()} == {30}
    assert {len(speeds) for speeds in measurement.decode.values()} == {3}
    asked = [name for name in engine.asked if name != "batch"][-120:]
    groups = [tuple(asked[at : at + 4]) for at in range(0, 120, 4)]
    assert all(sorted(group) == sorted(SECONDS) for group in groups)
    assert len(set(groups)) > 4


def test_more_rounds_than_there_are_questions(
    engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    assert head_selection.main(["--rounds", "33"]) == 1
    assert "need 1010 questions of 1000" in capsys.readouterr().err
    assert engine.asked == []


class ServedDifferently(ImageEngine):
    """An engine that has served a request in a way of its own."""

    def __init__(self, report: EngineReport, passes: int) -> None:
        self.prompt_tokens = 53
        self.engine = SimpleNamespace(
            engine_core=SimpleNamespace(
                engine_core=SimpleNamespace(
                    scheduler=SimpleNamespace(text_passes=SimpleNamespace(passes=passes))
                )
            )
        )
        self.llm: Any = SimpleNamespace(collective_rpc=lambda *_, **__: [report.as_dict()])


@pytest.mark.parametrize(
    ("condition", "change", "message"),
    [
        (COLD, {}, None),
        (COLD, {"passes": 0}, "0 texts were run alone, not 1"),
        (WARM, {}, "1 texts were run alone, not 0"),
        (COLD, {"length": 52}, r"prompts of \{52\} tokens"),
        (COLD, {"cached": 32}, "32 of them cached"),
        (COLD, {"missed": 1}, "not steered as asked"),
        (COLD, {"heads": []}, r"the heads chosen are \[\]"),
    ],
)
def test_a_request_that_was_served_differently_is_no_measurement(
    condition: Condition, change: dict[str, Any], message: str | None
) -> None:
    given = {"passes": 1, "length": 53, "cached": 0, "missed": 0, "heads": HEADS} | change
    report = EngineReport(
        positions_computed=53, positions_missed=given["missed"], heads=given["heads"]
    )
    served = ServedDifferently(report, given["passes"])
    request: Any = SimpleNamespace(report_id="one")
    output = SimpleNamespace(
        prompt_token_ids=[0] * given["length"], num_cached_tokens=given["cached"]
    )
    if message is None:
        assert served._check(condition, [request], [output], 0) == [report]
        return
    with pytest.raises(RuntimeError, match=message):
        served._check(condition, [request], [output], 0)


# What follows


def test_the_median_of_ratios_of_neighbours() -> None:
    drift = np.linspace(1.0, 3.0, 41)
    values = 1.25 * drift
    values[7] *= 50  # one sample far out
    ratio = paired_median(list(values), list(drift))
    assert ratio.value == pytest.approx(1.25)
    assert (ratio.low, ratio.high) == pytest.approx((1.25, 1.25))
    assert ratio.rounds == 41
    noise = np.exp(np.random.default_rng(0).normal(0, 0.04, 400))
    ratio = paired_median(list(noise), [1.0] * 400)
    # The standard error of a median is sqrt(pi / 2) times that of a mean.
    width = 2 * 1.96 * 0.04 * np.sqrt(np.pi / 2 / 400)
    assert ratio.high - ratio.low == pytest.approx(width, rel=0.25)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.20, 1.23, Verdict.HOLDS),
        (1.33, 1.35, Verdict.HOLDS),
        (1.34, 1.36, Verdict.UNKNOWN),
        (1.35, 1.37, Verdict.UNKNOWN),
        (1.36, 1.38, Verdict.FAILS),
        (1.10, 1.20, Verdict.HOLDS),
    ],
)
def test_verdicts_on_what_may_not_be_more(low: float, high: float, expected: Verdict) -> None:
    assert verdict(Ratio((low + high) / 2, low, high, 6), 1.35, at_most=True) == expected


def test_the_report_and_its_table(
    engine: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.json"
    assert head_selection.main(["--quick", "--json", str(output)]) == 0  # although a bar is missed
    report = json.loads(output.read_text())
    assert {"python", "packages", "cpu", "cores", "threads", "commit"} <= set(report["environment"])
    assert (report["prompt_tokens"], report["text_tokens"], report["dtype"]) == (53, 17, "float32")
    assert report["explicit_heads"] == HEADS and report["rounds"] == head_selection.QUICK_ROUNDS
    assert {len(each) for each in report["first_token"].values()} == {30}
    rows = report["comparisons"]
    values = [row["value"] for row in rows]
    assert values == pytest.approx([1.25, 1.1, 1.0, 0.985], rel=0.02)
    assert [row["bar"] for row in rows] == [1.35, 1.05, None, 0.97]
    assert [row["verdict"] for row in rows] == ["holds", "fails", None, "holds"]
    cpu = [row["cpu_time"]["value"] for row in rows]
    assert cpu == pytest.approx([1.25, 1.1, 1.0, 1.0], rel=0.02)
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "<= 1.35  holds" in lines["time to first token, auto, text never seen"]
    assert "<= 1.05  fails" in lines["time to first token, auto, text known"]
    assert lines["time to first token, explicit heads"].endswith("control")
    assert "0.985" in lines["tokens/s, auto"] and ">= 0.97  holds" in lines["tokens/s, auto"]
    assert "53 tokens, 17 of them text" in printed


@pytest.mark.parametrize(
    ("arguments", "rounds"), [([], 15), (["--quick"], 3), (["--quick", "--rounds", "3"], 3)]
)
def test_rounds(
    arguments: list[str],
    rounds: int,
    engine: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def run(rounds: int, seed: int) -> Any:
        asked.append((rounds, seed))
        raise RuntimeError("enough")

    monkeypatch.setattr(head_selection, "run", run)
    assert head_selection.main([*arguments, "--seed", "3"]) == 1
    assert asked == [(rounds, 3)]


@pytest.mark.parametrize("arguments", [["--rounds", "1"], ["--rounds", "x"], ["--dtype", "half"]])
def test_wrong_options(arguments: list[str], engine: type[FakeEngine]) -> None:
    with pytest.raises(SystemExit) as ended:
        head_selection.main(arguments)
    assert ended.value.code == 2 and engine.asked == []


def test_what_an_engine_prints_stays_out_of_the_report(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(model: Path, seed: int) -> None:
        print("loading")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(head_selection, "ImageEngine", fails)
    assert head_selection.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "loading" in printed.err and "out of memory" in printed.err


def test_settings_of_malloc_that_come_too_late_are_not_claimed(
    engine: type[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = {"MALLOC_TRIM_THRESHOLD_": "1", "MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_MMAP_MAX_": "1"}
    for name in late:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(head_selection, "KEEP_MEMORY", late)
    monkeypatch.setattr(head_selection, "settings", lambda on_cuda: late)
    output = tmp_path / "report.json"
    assert head_selection.main(["--quick", "--json", str(output)]) == 0
    assert not late.keys() & json.loads(output.read_text())["engine_settings"].keys()
    assert not late.keys() & os.environ.keys()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # at the start, as it were
    assert head_selection.main(["--quick", "--json", str(output)]) == 0
    used = json.loads(output.read_text())["engine_settings"]
    assert used["MALLOC_MMAP_MAX_"] == "0" and used.keys() & late.keys() == {"MALLOC_MMAP_MAX_"}


def test_nothing_is_measured_under_the_interpreter(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert head_selection.main([]) == 2
    assert "no measurements" in capsys.readouterr().err and engine.asked == []


def test_vllm_is_not_imported_before_its_environment_is_set() -> None:
    code = "import headway.benchmarks.head_selection, sys; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
