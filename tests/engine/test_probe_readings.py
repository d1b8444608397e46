"""What the engine keeps of what probes read, against the formula on a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from headway.steering import SteeringProgram
from headway.steering.artifacts import encode_artifact
from headway.steering.profiles import NamedProfiles
from headway.steering.program import ResidualSite
from headway.steering.vectors import FeedbackRule
from tests.engine.harness import GEOMETRY, Harness, Job
from tests.engine.harness import program as compiled
from tests.residual import Added
from tests.vectors import drawn_profile

pytestmark = pytest.mark.engine

RULE = FeedbackRule()
PROFILES = {
    "behind": drawn_profile(GEOMETRY, layers=(4, 12, 29), feedback=RULE),
    "inside": drawn_profile(
        GEOMETRY, layers=(7, 8), seed=1, feedback=RULE, site=ResidualSite.AFTER_ATTENTION
    ),
    "before": drawn_profile(
        GEOMETRY, layers=(0, 20), seed=2, feedback=RULE, site=ResidualSite.BLOCK_INPUT
    ),
    "fixed": drawn_profile(GEOMETRY, layers=(4, 12), seed=3),
}
SERVED = replace(GEOMETRY, profiles=NamedProfiles(PROFILES))
ASKS = [
    [{"method": "gact", "profile": "behind", "strength": 0.7}],
    [{"method": "gact", "profile": "inside", "strength": -0.6, "scope": "all"}],
    [
        {"method": "gact", "profile": "before", "strength": 0.5},
        {"method": "gact", "profile": "behind", "strength": 0.4, "layers": [12]},
    ],
]
SILENT = [
    [{"method": "gact", "profile": "fixed", "strength": 0.5}],
    [{"method": "gact", "profile": "behind", "strength": 0.5, "cluster": 1}],
    [{"method": "gact", "profile": "behind", "strength": 0.5, "scope": "output"}],
]
MAX_TOKENS = 5


def program(methods: list[dict[str, Any]]) -> SteeringProgram:
    return compiled(*methods, geometry=SERVED)


@pytest.fixture(scope="module")
def loaded(harness: Harness) -> Iterator[Harness]:
    worker = harness.core.model_executor.driver_worker.worker
    artifacts = [each for one in PROFILES.values() for each in one.artifacts.values()]
    digests = worker.headway_load_artifacts([encode_artifact(each) for each in artifacts])
    yield harness
    worker.headway_unload_artifacts(digests)


def jobs(prompts: list[list[int]]) -> list[Job]:
    """Those that ask, those that do not, and one that is not steered."""
    programs = [*map(program, ASKS), *map(program, SILENT), None]
    return [Job(prompt, each, MAX_TOKENS) for prompt, each in zip(prompts, programs, strict=False)]


def read(harness: Harness, job: Job) -> list[list[Any]]:
    """What was read of a job that ran."""
    assert job.request is not None
    report = harness.runner.steering.pop_report(job.request.report_id)
    assert report is not None and report.is_complete
    probes: list[list[Any]] = report.probes
    return probes


def check(probes: list[list[Any]], job: Job, oracle: Any) -> None:
    assert job.program is not None
    added = Added(job.program.artifacts, job.program.residual_edits, len(job.prompt))
    with added.on(oracle.decoder.layers):
        oracle.logits(job.prompt)
    assert [point for point, _, _ in probes] == sorted(added.read)
    for point, cluster, row in probes:
        expected, picked = added.read[point]
        difference = torch.tensor(np.frombuffer(row, "<f4").copy()) - expected
        assert difference.abs().max() <= 1e-3
        assert cluster == picked


@pytest.mark.parametrize(
    "schedule", [{}, {"step_tokens": 9}, {"preempt_after": [2, 4]}, {"stagger": 2}]
)
def test_rows_equal_the_oracle(
    loaded: Harness, attention_oracle: Any, prompts: list[list[int]], schedule: dict[str, Any]
) -> None:
    """And nothing is kept for programs that do not ask."""
    loaded.forget_cache()
    several = jobs(prompts)
    loaded.run(several, **schedule)
    kept = loaded.runner.steering.reports.probes
    asking = several[: len(ASKS)]
    assert {job.request.report_id for job in asking if job.request} <= set(kept)
    for job in asking:
        check(read(loaded, job), job, attention_oracle)
    for job in several[len(ASKS) : -1]:
        assert job.request is not None and job.request.report_id not in kept
        assert read(loaded, job) == []


def test_a_cached_prompt_is_read_again(
    loaded: Harness, attention_oracle: Any, prompts: list[list[int]]
) -> None:
    long = max(prompts, key=len)
    first, second = (Job(long, program(ASKS[0]), MAX_TOKENS) for _ in range(2))
    loaded.forget_cache()
    loaded.run([first])
    [result] = loaded.run([second])
    assert result.cached > 0
    for job in (first, second):
        check(read(loaded, job), job, attention_oracle)


def test_of_several_sequences_there_is_one_reading(
    loaded: Harness, attention_oracle: Any, prompts: list[list[int]]
) -> None:
    sampling = {"n": 3, "temperature": 1.0, "seed": 3}
    job = Job(prompts[0], program(ASKS[0]), MAX_TOKENS, sampling=sampling)
    loaded.run([job])
    check(read(loaded, job), job, attention_oracle)
