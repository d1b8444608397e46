"""An edit whose numbers overflow ends its own request, and leaves nothing behind for others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from headway.server.engine import cpu_worker
from headway.server.engine.nonfinite import MESSAGE
from headway.server.engine.request import SteeringRequest, attach
from headway.steering.artifacts import ResidualArtifact
from headway.steering.program import (
    QueryScope,
    ResidualEdit,
    ResidualForm,
    ResidualSite,
    SteeringProgram,
)
from tests.engine.harness import GEOMETRY, Harness, Job, program
from tests.residual import residual_program

pytestmark = pytest.mark.engine

HUGE = ResidualArtifact.constant(np.full(GEOMETRY.hidden_size, 3e38, np.float32))
"""Finite, as every artefact must be; added twice it is infinite, its square is so at once."""

STEERED = program({"method": "vhr", "heads": [[2, 2], [20, 3]], "alpha": 1.5})


def huge(*places: tuple[int, ResidualSite], scope: QueryScope = QueryScope.ALL) -> SteeringProgram:
    """A program that adds the vector at these layers and sites."""
    edits = [
        ResidualEdit(layer, HUGE.digest, 1.0, scope, site=site, form=ResidualForm.ADD)
        for layer, site in places
    ]
    return residual_program(*edits)


ENTRANCE = ResidualSite.BLOCK_INPUT
TWICE = (4, ENTRANCE), (8, ENTRANCE)
PROGRAMS = {
    "NaN": huge(*TWICE),
    "NaN behind the last attention": huge(
        (29, ResidualSite.AFTER_ATTENTION), (29, ResidualSite.BLOCK_OUTPUT)
    ),
    "a norm of zeros": huge((2, ENTRANCE)),
}


@pytest.fixture(autouse=True)
def loaded(harness: Harness) -> Iterator[None]:
    harness.runner.steering.artifacts.load([HUGE])
    harness.forget_cache()
    yield
    harness.scheduler.tainted.clear()
    for cache in caches(harness):
        cache.nan_to_num_(0.0, 0.0, 0.0)  # where a test left them


def caches(harness: Harness) -> list[torch.Tensor]:
    context = harness.runner.vllm_config.compilation_config.static_forward_context
    return [module.kv_cache for module in context.values()]


def holds_nan(harness: Harness, blocks: list[int]) -> bool:
    return any(bool(cache[blocks].isnan().any()) for cache in caches(harness))


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_ends_alone(harness, prompts, name):
    jobs = [
        Job(prompts[0]),
        Job(prompts[1], STEERED),
        Job(prompts[2], PROGRAMS[name]),
        Job(prompts[3], STEERED),
        Job(prompts[4]),
    ]
    expected = harness.run([job for job in jobs if job.program is not PROGRAMS[name]])
    harness.forget_cache()
    got = harness.run(jobs)
    failed = got.pop(2)
    assert (failed.finish_reason, failed.tokens) == ("error", [])
    report = harness.runner.steering.pop_report(jobs[2].request.report_id)
    assert (report.failed_stage, report.failure) == ("nonfinite", f"FloatingPointError: {MESSAGE}")
    for result, want in zip(got, expected, strict=True):
        assert result.finish_reason == "length"
        assert result.tokens == want.tokens
        assert result.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    harness.run([Job(prompts[0], max_tokens=2)])  # the step that forgets who has ended
    assert harness.runner.steering.requests == {}
    assert harness.runner.steering.tables.num_used == 0


def test_what_was_said_before_stays_said(harness, prompts):
    """Only output is edited: the first token comes from the prompt, and the second never comes."""
    [result] = harness.run([Job(prompts[2], huge(*TWICE, scope=QueryScope.OUTPUT))])
    assert (result.finish_reason, len(result.tokens)) == ("error", 1)


def test_it_is_seen_in_the_chunk_of_a_prompt_where_it_happens(harness, prompts):
    job = Job(prompts[9] * 4, PROGRAMS["NaN"])
    [result] = harness.run([job], step_tokens=32)
    assert (result.finish_reason, result.tokens) == ("error", [])
    report = harness.runner.steering.pop_report(job.request.report_id)
    assert (report.failed_stage, report.positions_computed) == ("nonfinite", 32)


def test_unsteered_rows_are_vllms_own_business(harness, prompts, monkeypatch):
    """Whatever vLLM makes of NaN, an unsteered request is served as by stock vLLM."""
    original = cpu_worker.fail_lost_rows

    def fail_lost_rows(steering, request_ids, hidden_states, logits):
        original(steering, request_ids, torch.full_like(hidden_states, float("nan")), logits)

    monkeypatch.setattr(cpu_worker, "fail_lost_rows", fail_lost_rows)
    results = harness.run([Job(prompts[0]), Job(prompts[1], STEERED)])
    assert [result.finish_reason for result in results] == ["length", "error"]


@pytest.mark.parametrize("clears", [True, False], ids=["cleared", "without clearing"])
def test_whoever_gets_its_blocks_finds_no_nan(harness, prompts, monkeypatch, clears):
    """Without the clearing the answer is another one, so that this could fail."""
    if not clears:
        monkeypatch.setattr(cpu_worker, "clear_blocks", lambda runner, output: None)
    victim = Job(prompts[0][:5], max_tokens=4)
    [want] = harness.run([victim])
    harness.forget_cache()
    harness.run([Job(prompts[9][:30], PROGRAMS["NaN"])])
    tainted = sorted(harness.scheduler.tainted)
    assert tainted and holds_nan(harness, tainted)
    [got] = harness.run([victim])  # blocks that are not cached are the first to be used again
    agrees = got.tokens == want.tokens and got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    assert agrees is clears
    assert holds_nan(harness, tainted) is not clears


def leave_in_mid_step(harness: Harness, prompt: list[int]) -> list[int]:
    """The blocks that are tainted when a client goes while its step runs, a step with NaN.

    Nobody looks at what came of it.
    """
    params = SamplingParams(max_tokens=4, temperature=0)
    attach(params, SteeringRequest(PROGRAMS["NaN"]))
    engine = harness.llm.llm_engine
    engine.add_request("leaves", {"prompt_token_ids": prompt}, params)
    [request_id] = harness.scheduler.requests
    harness.core.aborts_queue.put_nowait([request_id])
    engine.step()
    engine.abort_request(["leaves"])
    return sorted(harness.scheduler.tainted)


def test_a_request_that_leaves_in_mid_step_leaves_no_nan_either(harness, prompts):
    tainted = leave_in_mid_step(harness, prompts[9][:30])
    assert tainted and holds_nan(harness, tainted)
    harness.run([Job(prompts[0][:5], max_tokens=2)])
    assert not harness.scheduler.tainted and not holds_nan(harness, tainted)


def test_one_that_ends_well_taints_nothing(harness, prompts):
    harness.run([Job(prompts[1], STEERED), Job(prompts[2])])
    assert not harness.scheduler.tainted


def test_one_that_wants_the_logprobs_of_its_prompt_ends_alone_too(harness, prompts):
    """Logprobs without a token would stop the whole engine."""
    wants = {"prompt_logprobs": 0}
    jobs = [
        Job(prompts[2], PROGRAMS["NaN"], sampling=wants),
        Job(prompts[0]),
        Job(prompts[1], sampling=wants),
    ]
    got = harness.run(jobs)
    assert [result.finish_reason for result in got] == ["error", "length", "length"]
    assert got[0].tokens == []


def test_who_shares_its_prompt_before_the_edit_goes_on(harness, prompts):
    """The blocks before the last prompt token are those of an unsteered request, and NaN does not
    reach them: they stay in the cache, and the request that hits them in the very step goes on.
    """
    prompt = prompts[9] * 4
    steered = huge(*TWICE, scope=QueryScope.FROM_LAST_PROMPT_TOKEN)
    [want] = harness.run([Job(prompt)])
    harness.forget_cache()
    failed, got = harness.run([Job(prompt, steered), Job(prompt)])
    assert (failed.finish_reason, failed.tokens) == ("error", [])
    assert (got.finish_reason, got.tokens) == ("length", want.tokens)
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    shared = (len(prompt) - 1) // 32 * 32
    assert got.cached == shared > 32
    [again] = harness.run([Job(prompt, max_tokens=1)])
    assert again.cached == shared and again.tokens == want.tokens[:1]


def test_what_it_left_is_not_found_in_the_cache(harness, prompts):
    tainted = leave_in_mid_step(harness, prompts[9] * 4)
    blocks = harness.scheduler.kv_cache_manager.block_pool.blocks
    assert len(tainted) > 3 and holds_nan(harness, tainted)
    assert all(blocks[each].block_hash is None for each in tainted)
    harness.run([Job(prompts[0][:5], max_tokens=2)])
