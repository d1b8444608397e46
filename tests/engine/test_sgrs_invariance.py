"""Which tokens a gate takes is a function of seed and positions, never of scheduling.

As test_invariance.py, with gated requests at temperature 0 and drawn by a seed.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from tests.engine.harness import Job, program
from tests.engine.schedules import Alone, check_schedule, run_drawn, schedules

pytestmark = pytest.mark.engine

LENGTH = 8
SGRS = {"method": "sgrs", "alpha": 1.0}
LOCORE = {"method": "locore", "beta": 1.5, "history": "any"}
VHR = {"method": "vhr", "heads": [[3, 1], [9, 0], [11, 7]], "alpha": 1.6}

REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    (None, {}),
    (program(SGRS), {}),
    (program(SGRS), {"temperature": 1.3, "seed": 11}),
    (program(SGRS), {"temperature": 1.3, "seed": 12}),
    (
        program({**SGRS, "alpha": 1.1, "layers": [5, 20], "top_k": 8, "max_resample": 6}),
        {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 3, "presence_penalty": 0.5},
    ),
    (program(VHR, LOCORE, SGRS), {"temperature": 1.1, "seed": 7}),
    (program(report={"saliency": True}), {"temperature": 1.0, "seed": 4}),
    (program(LOCORE), {"temperature": 1.0, "seed": 4}),
]


@pytest.fixture(scope="module")
def alone(harness, prompts) -> Alone:
    def job(prompt: int, chosen: int) -> Job:
        steered, sampling = REQUESTS[chosen]
        # Longer than a block, so that the cache has something to share.
        return Job(prompts[prompt] * 2, steered, LENGTH, sampling=sampling)

    return Alone(harness, job)


@settings(run_drawn, max_examples=10)
@given(schedule=schedules(3, len(REQUESTS), [17, 40, 150, 2048], 6, 14))
def test_scheduling_does_not_change_the_answer(alone, schedule):
    check_schedule(alone, schedule)


def test_requests_tell_apart(alone):
    """The expected answers differ, and gates refuse something in them."""
    steering = alone.harness.runner.steering
    for prompt in range(3):
        tokens = {tuple(alone(prompt, chosen).tokens) for chosen in range(len(REQUESTS))}
        assert len(tokens) >= len(REQUESTS) // 2
    refusals = 0
    for chosen in (1, 2, 4, 5):
        job = alone.job_of(0, chosen)
        alone.harness.run([job])
        refusals += steering.pop_report(job.request.report_id).saliency[0]["refusals"]
    assert refusals >= 4


def test_preemption_keeps_what_was_accepted(harness, prompts):
    """Every token of a preempted request is in its report once, with the saliency it had."""
    steered = program(SGRS, report={"saliency": True})
    reports = []
    for preempt_after in ([], [4, 8]):
        harness.forget_cache()
        job = Job(prompts[1], steered, 12, sampling={"temperature": 1.2, "seed": 2})
        (result,) = harness.run([job], preempt_after=preempt_after)
        report = harness.runner.steering.pop_report(job.request.report_id)
        assert (report.positions_computed > len(prompts[1]) + 12) == bool(preempt_after)
        assert [row[1] for row in report.saliency[0]["tokens"]] == result.tokens
        reports.append(report.saliency[0])
    undisturbed, preempted = reports
    pairs = list(zip(undisturbed["tokens"], preempted["tokens"], strict=True))
    assert pairs[0][0] == pairs[0][1]  # which has no history, and no saliency
    for row, other in pairs[1:]:
        assert row[:2] + row[4:] == other[:2] + other[4:]
        assert row[2:4] == pytest.approx(other[2:4], rel=1e-3)


@pytest.mark.parametrize("steered", [None, program(SGRS)], ids=["unsteered", "gated"])
def test_a_seed_survives_a_prompt_computed_in_parts(harness, prompts, steered):
    """Nothing is drawn from the request's stream before its first token."""
    results = []
    for step_tokens in (None, 19):
        harness.forget_cache()
        job = Job(prompts[9] * 2, steered, 8, sampling={"temperature": 1.5, "seed": 8})
        results.append(harness.run([job], step_tokens=step_tokens)[0].tokens)
    assert results[0] == results[1]
