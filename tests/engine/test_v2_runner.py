"""The GPU path in vLLM's real V2 runner, interpreted, against the V1 engine on CPU.

The V2 engines run in processes of their own (see `v2_run.py`), once, with all batches of this file.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from headway.steering import SteeringProgram
from headway.steering.artifacts import ResidualArtifact, encode_artifact
from headway.steering.head_words import HeadField, HeadWords, index_shifts
from headway.steering.program import (
    AppliedMethod,
    HeadEdit,
    QueryScope,
    ResidualEdit,
    ResidualForm,
)
from tests.engine.harness import Job, program
from tests.engine.test_var import LLAVA, QUESTIONS, Question, var
from tests.residual import drawn_artifact, residual_program

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MAX_TOKENS = 3
TEXT = "A list of numbers: one, two, three, four, five"


def steered(*methods: dict[str, Any], report: str = "full") -> SteeringProgram:
    return program(*methods, geometry=LLAVA, report=report)


def shifted() -> SteeringProgram:
    """Scales and shifts of some head outputs, from the last prompt token on and everywhere."""
    draw = np.random.default_rng(5)
    words = HeadWords.identity(LLAVA)
    shift = np.zeros((LLAVA.num_layers, LLAVA.num_heads, LLAVA.head_size), np.float32)
    for layer, head in ((0, 3), (2, 5), (3, 0)):
        words.table[layer, head, HeadField.SCALE] = 0.5
        shift[layer, head] = 0.3 * draw.standard_normal(LLAVA.head_size)
    words.table[..., HeadField.SHIFT_INDEX], shifts = index_shifts(shift)
    edit = HeadEdit(HeadWords(words.table, shifts))
    return SteeringProgram((edit,), applied=(AppliedMethod("drawn", {}),))


ARTIFACT = drawn_artifact(7, LLAVA.hidden_size)
HUGE = ResidualArtifact.constant(np.full(LLAVA.hidden_size, 3e38, np.float32))
ENCODED = [encode_artifact(ARTIFACT), encode_artifact(HUGE)]
OVERFLOW = residual_program(
    *(
        ResidualEdit(layer, HUGE.digest, 1.0, QueryScope.ALL, form=ResidualForm.ADD)
        for layer in (1, 2)
    )
)
HEADS = [[0, 1], [1, 6], [3, 2]]
PROGRAMS = {
    "VAR": var(layers=[1, 2, 3], rho=0.3),
    "VHR": steered({"method": "vhr", "heads": HEADS, "alpha": 1.7}),
    "VAR and VHR": steered(
        {"method": "var", "sink_dims": [5, 9], "tau": 2.9, "layers": [1, 2]},
        {"method": "vhr", "heads": [[0, 2], [2, 7]], "alpha": 1.5},
    ),
    "LocoRE": steered({"method": "locore", "beta": 1.0, "layers": [0, 1, 2, 3], "window": 3}),
    "LocoRE, any token": steered(
        {"method": "locore", "beta": 0.8, "history": "any", "renormalize": False, "layers": [1, 3]}
    ),
    "emphasis": steered({"method": "emphasis", "spans": [{"tokens": [3, 8]}], "alpha": 0.1}),
    "zero": steered({"method": "head_ablation", "mode": "zero", "heads": HEADS}),
    "uniform": steered({"method": "head_ablation", "mode": "uniform", "heads": HEADS}),
    "identity": steered({"method": "head_ablation", "mode": "identity", "heads": HEADS, "u": 0.6}),
    "shifts": shifted(),
    "VHR auto": steered({"method": "vhr", "alpha": 1.7}),
    "VHR auto, baseline": steered({"method": "vhr", "alpha": 1.7, "reinforce_baseline": True}),
    "residual edits": residual_program(
        ResidualEdit(1, ARTIFACT.digest, 0.4, QueryScope.ALL),
        ResidualEdit(3, ARTIFACT.digest, -0.6),
    ),
}
CASES = ("mixed", "disturbed", "warm", "behind overflow")
# Interpreted kernels take minutes and one core. What shares a process shares its cache, in order.
PROCESSES = (("mixed", "overflow", "behind overflow"), ("disturbed", "warm"))
# Bound by vLLM, both would run on the same cores.
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ON_TEXT = ("LocoRE, any token", "emphasis", "zero", "uniform", "identity", "shifts")


class Case:
    """Named jobs that run together, and how."""

    def __init__(self, jobs: dict[str, Job], **options: Any) -> None:
        self.names = list(jobs)
        self.jobs = list(jobs.values())
        self.options = options


@pytest.fixture(scope="module")
def cases(llava_folder) -> dict[str, Case]:
    processor = AutoProcessor.from_pretrained(llava_folder)
    questions = [Question(processor, index) for index in range(len(QUESTIONS))]
    text = processor.tokenizer(TEXT)["input_ids"]
    jobs = {"unsteered": questions[0].job(None, MAX_TOKENS), "text": Job(text, None, MAX_TOKENS)}
    for name, steered in PROGRAMS.items():
        if name in ON_TEXT:
            jobs[name] = Job(text, steered, MAX_TOKENS)
        else:
            question = questions[2 if name == "VAR and VHR" else 0]  # two images, or one
            jobs[name] = question.job(steered, MAX_TOKENS)

    def some(*names: str) -> dict[str, Job]:
        return {name: jobs[name] for name in names}

    return {
        "mixed": Case(jobs),
        # An image is 16 tokens: chunks end inside of images. Where heads are chosen, none begins.
        "disturbed": Case(
            some("VAR and VHR", "LocoRE", "VHR auto", "residual edits"),
            step_tokens=40,
            preempt_after=[3],
            forget_cache=True,
        ),
        "warm": Case(some("VAR and VHR", "residual edits", "VHR auto")),
        "overflow": Case({"bad": Job(text, OVERFLOW, MAX_TOKENS), **some("text", "emphasis")}),
        # In the blocks that the overflow has left.
        "behind overflow": Case(some("text"), forget_cache=True),
    }


@pytest.fixture(scope="module")
def v2(tmp_path_factory, llava_folder, cases) -> dict[str, tuple[list, list]]:
    """Results and reports of every case, from the V2 runner."""
    folder = tmp_path_factory.mktemp("v2")
    engine = {
        "model": str(llava_folder),
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 16,
        "max_model_len": 256,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 1 << 26,
        "limit_mm_per_prompt": {"image": 2},
        "seed": 0,
    }

    def run(number: int, names: tuple[str, ...]) -> dict[str, tuple[list, list]]:
        source, target = folder / f"task {number}", folder / f"done {number}"
        runs = [(cases[name].jobs, cases[name].options) for name in names]
        source.write_bytes(
            pickle.dumps({"engine": engine, "artifacts": ENCODED, "runs": runs}),
        )
        script = Path(__file__).parent / "v2_run.py"
        done = subprocess.run(
            [sys.executable, str(script), str(source), str(target)],
            env={**os.environ, "VLLM_PLUGINS": "headway", **ONE_THREAD},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        assert "Using V2 Model Runner" in done.stdout + done.stderr
        assert "not warmed up" not in done.stdout + done.stderr
        print(done.stdout[-2000:])
        return dict(zip(names, pickle.loads(target.read_bytes()), strict=True))

    with ThreadPoolExecutor() as threads:
        parts = threads.map(run, range(len(PROCESSES)), PROCESSES)
        return {name: results for part in parts for name, results in part.items()}


@pytest.fixture(scope="module")
def v1(llava, cases) -> dict[str, tuple[list, list]]:
    """The same from the V1 engine on CPU."""
    llava.llm.collective_rpc("headway_load_artifacts", args=(ENCODED,))
    done = {}
    for name, case in cases.items():
        options = dict(case.options)
        if options.pop("forget_cache", True):
            llava.forget_cache()
        results = llava.run(case.jobs, **options)
        requests = [job.request for job in case.jobs]
        reports = [
            each and llava.runner.steering.pop_report(each.report_id).as_dict() for each in requests
        ]
        done[name] = results, reports
    return done


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logprobs_are_those_of_the_cpu_engine(cases, v1, v2, name):
    for job, got, want in zip(cases[name].names, v2[name][0], v1[name][0], strict=True):
        assert got.tokens == want.tokens, job
        worst = np.abs(np.array(got.logprobs) - np.array(want.logprobs)).max()
        assert worst <= 1e-3, (job, worst)


def test_the_edits_matter(cases, v1):
    """Every steered job answers otherwise than the same prompt unsteered, so that it could fail."""
    by_name = dict(zip(cases["mixed"].names, v1["mixed"][0], strict=True))
    for name, result in by_name.items():
        same = [other for other in by_name if other != name and by_name[other] == result]
        assert not same, (name, same)


@pytest.mark.parametrize("name", CASES)
def test_reports_are_those_of_the_cpu_engine(cases, v1, v2, name):
    for job, got, want in zip(cases[name].names, v2[name][1], v1[name][1], strict=True):
        if want is None:
            assert got is None
            continue
        if name == "mixed":  # how much is computed again depends on the schedule
            assert got["by_scope"] == want["by_scope"], job
        assert got["failed_stage"] is None and got["positions_missed"] == 0, job
        assert got["heads"] == want["heads"] and bool(got["heads"]) == ("auto" in job), job
        if want["readings"] is not None and name == "mixed":
            assert_readings_equal(got["readings"], want["readings"])


def assert_readings_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert (got["met"], got["considered"]) == (want["met"], want["considered"])
    assert [mass[:2] for mass in got["masses"]] == [mass[:2] for mass in want["masses"]]
    for ours, theirs in zip(got["masses"], want["masses"], strict=True):
        np.testing.assert_allclose(ours[2:], theirs[2:], atol=1e-4)


@pytest.mark.parametrize("engine", ["v1", "v2"])
def test_an_edit_that_overflows_ends_alone(request, engine):
    """On GPU the host learns of it with the sampled tokens, and without waiting."""
    done = request.getfixturevalue(engine)
    results, reports = done["overflow"]
    bad, *others = results
    assert (bad.finish_reason, bad.tokens) == ("error", [])
    assert reports[0]["failed_stage"] == "nonfinite"
    by_name = dict(zip(PROGRAMS, done["mixed"][0][2:], strict=True))
    for got, want in zip(others, (done["mixed"][0][1], by_name["emphasis"]), strict=True):
        assert got.finish_reason == "length"
        assert got.tokens == want.tokens
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


def test_cached_blocks_of_steered_requests_are_used(cases, v2):
    cached = dict(zip(cases["warm"].names, (each.cached for each in v2["warm"][0]), strict=True))
    assert min(cached.values()) >= 16
