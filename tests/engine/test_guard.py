"""A steering hook that fails ends its own request and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headway.server.engine import attention_layout, cpu_plan, slots, steered_request
from tests.engine.harness import Job, program
from tests.engine.offline import run_offline

pytestmark = pytest.mark.engine

BAD_ALPHA = 3.25


def jobs_with_one_bad(prompts: list[list[int]]) -> list[Job]:
    """16 requests: 10 steered, 5 unsteered, and one (index 5) whose edit will be made to fail."""
    jobs = []
    for index, prompt in enumerate(prompts[:16]):
        heads = [[index, index % 9], [20, 3]]
        alpha = BAD_ALPHA if index == 5 else 1.5
        steered = None if index % 3 == 0 else {"method": "vhr", "heads": heads, "alpha": alpha}
        jobs.append(Job(prompt, program(steered) if steered else None, 8))
    return jobs


def fail_in_kernel(monkeypatch) -> None:
    original = cpu_plan.head_affine_

    def head_affine_(z, rows, scale, shift=None):
        if (scale == BAD_ALPHA).any():
            raise RuntimeError("injected")
        original(z, rows, scale, shift)

    monkeypatch.setattr(cpu_plan, "head_affine_", head_affine_)


def fail_in_decode(monkeypatch) -> None:
    original = steered_request.decode_program

    def decode_program(wire, geometry):
        program = original(wire, geometry)
        if (program.head_edits[0].words.table == BAD_ALPHA).any():
            raise KeyError("injected")
        return program

    monkeypatch.setattr(steered_request, "decode_program", decode_program)


def fail_in_upload(monkeypatch) -> None:
    original = slots.SlotTables.acquire

    def acquire(self, words, *rest):
        if (words.table == BAD_ALPHA).any():
            raise RuntimeError("injected")
        return original(self, words, *rest)

    monkeypatch.setattr(slots.SlotTables, "acquire", acquire)


FAULTS = {"edit": fail_in_kernel, "decode": fail_in_decode, "slot": fail_in_upload}


def test_a_failing_attention_edit_ends_its_request_and_no_other(harness, prompts, monkeypatch):
    """LocoRE requests of several strengths in one batch; the kernel raises for one of them."""
    betas = [0.5, 0.8, None, 1.0, 0.5]
    bad = np.float32(math.log1p(0.8))
    jobs = [
        Job(prompt, beta and program({"method": "locore", "beta": beta}))
        for prompt, beta in zip(prompts, betas, strict=False)
    ]
    harness.forget_cache()
    expected = harness.run(jobs)
    harness.forget_cache()
    original = attention_layout.segment_attention

    def segment_attention(*args):
        if (args[5] == bad).any():
            raise RuntimeError("injected")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(attention_layout, "segment_attention", segment_attention)
        results = harness.run(jobs)
    assert [result.finish_reason for result in results] == [
        "length" if beta != 0.8 else "error" for beta in betas
    ]
    assert len(results[1].tokens) == 1  # from the prompt, which LocoRE leaves alone
    report = harness.runner.steering.pop_report(jobs[1].request.report_id)
    assert (report.failed_stage, report.failure) == ("edit", "RuntimeError: injected")
    for index in (0, 2, 3, 4):
        assert results[index].tokens == expected[index].tokens
        assert results[index].logprobs == pytest.approx(expected[index].logprobs, abs=1e-5)


@pytest.mark.parametrize("stage", FAULTS)
def test_one_failing_request_of_sixteen(harness, prompts, monkeypatch, stage):
    harness.forget_cache()
    expected = harness.run(jobs_with_one_bad(prompts))
    harness.forget_cache()
    jobs = jobs_with_one_bad(prompts)
    with monkeypatch.context() as patch:
        FAULTS[stage](patch)
        results = harness.run(jobs)
    for index, (job, got, want) in enumerate(zip(jobs, results, expected, strict=True)):
        if index == 5:
            assert got.finish_reason == "error"
            assert got.tokens == []  # not one token of a step that was not steered
            report = harness.runner.steering.pop_report(job.request.report_id)
            assert report.failed_stage == stage
            assert "injected" in report.failure
            assert not report.is_complete
            continue
        assert got.finish_reason == "length"
        assert got.tokens == want.tokens
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
        if job.request is not None:
            assert harness.runner.steering.pop_report(job.request.report_id).is_complete


def test_a_failed_request_leaves_nothing_in_the_prefix_cache(harness, prompts, monkeypatch):
    prompt = prompts[9] * 4
    job = Job(prompt, program({"method": "vhr", "heads": [[2, 2]], "alpha": BAD_ALPHA}), 4)
    harness.forget_cache()
    want = harness.run([job])[0]
    harness.forget_cache()
    with monkeypatch.context() as patch:
        fail_in_kernel(patch)
        assert harness.run([job])[0].finish_reason == "error"
    got = harness.run([job])[0]
    assert got.cached == 0
    assert got.tokens == want.tokens
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)


def test_a_failure_in_mid_output_spares_good_blocks(harness, prompts, monkeypatch):
    """Blocks written before the failing step were steered and stay shared."""
    prompt = prompts[9] * 4
    job = Job(prompt, program({"method": "vhr", "heads": [[2, 2]], "alpha": BAD_ALPHA}), 6)
    harness.forget_cache()
    original = cpu_plan.CpuStepPlan.edit_head_outputs
    calls = []

    def edit_head_outputs(self, layer, output):
        calls.append(layer)
        if calls.count(2) == 3 and layer == 2:  # the third step: two tokens are out
            self.failures[self.layout.spans[0].request_id] = RuntimeError("injected")
        original(self, layer, output)

    with monkeypatch.context() as patch:
        patch.setattr(cpu_plan.CpuStepPlan, "edit_head_outputs", edit_head_outputs)
        result = harness.run([job])[0]
    assert result.finish_reason == "error"
    assert len(result.tokens) == 2
    again = harness.run([job])[0]
    assert again.finish_reason == "length"
    assert again.cached > 0


def test_attention_that_bypasses_the_edit_is_noticed(harness, prompts, monkeypatch):
    """If another backend computed a layer, the request fails; it is not served unsteered."""
    job = Job(prompts[0], program({"method": "vhr", "heads": [[2, 2]], "alpha": 2.0}), 4)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_plan.CpuStepPlan, "edit_head_outputs", lambda self, layer, output: None)
        result = harness.run([job])[0]
    assert result.finish_reason == "error"
    report = harness.runner.steering.pop_report(job.request.report_id)
    assert "an edit did not run on layers [2]" in report.failure


def test_the_engine_is_as_before(harness, prompts):
    """After all those failures: no slot, request or block is lost."""
    harness.run([Job(prompts[0], max_tokens=2)])
    state = harness.runner.steering
    assert state.requests == {}
    assert state.tables.num_used == 0
    harness.forget_cache()
    pool = harness.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # all but the null block


@pytest.mark.slow
def test_the_failure_crosses_process_boundaries(prompts, tmp_path):
    """Worker, scheduler and front end in a process each, as by default."""
    specs = [
        {"methods": [{"method": "vhr", "heads": [[2, 2]], "alpha": alpha}]}
        for alpha in (1.5, BAD_ALPHA, 2.0)
    ]
    requests = [
        {"prompt": prompt, "steering": spec, "sampling": {"temperature": 0.0, "max_tokens": 4}}
        for prompt, spec in zip(prompts, [*specs, None], strict=False)
    ]
    results = run_offline(tmp_path, True, requests, fail_scale=BAD_ALPHA, dtype="float32")
    reasons = [result["finish_reason"] for result in results]
    assert reasons == ["length", "error", "length", "length"]
    assert [len(result["tokens"]) for result in results] == [4, 0, 4, 4]
