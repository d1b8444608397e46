"""Gates beside everything else that decides which token is sampled, limits, and failures."""

from __future__ import annotations

import re

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from headway.server.engine.saliency import SaliencyPass
from headway.steering import sampling_params
from tests.engine.harness import Job, program
from tests.engine.test_sgrs import report_of

pytestmark = pytest.mark.engine

EOS = 2
STRICT = {"method": "sgrs", "alpha": 1.0}
IMPOSSIBLE = {"method": "sgrs", "alpha": 10.0}
READ = {"saliency": True}


def test_candidates_are_those_of_the_grammar(harness, prompts):
    """A gate that refuses nearly all takes none that the grammar forbids."""
    harness.runner.steering.reports.clear()
    params = SamplingParams(
        temperature=1.0,
        seed=3,
        max_tokens=24,
        structured_outputs=StructuredOutputsParams(regex="[A-C]-[0-9]{6}(, [A-C]-[0-9]{6}){2}"),
    )
    spec = {"methods": [STRICT], "report": READ}
    (output,) = harness.llm.generate(
        {"prompt_token_ids": prompts[2]}, sampling_params(params, spec), use_tqdm=False
    )
    text = output.outputs[0].text
    (report,) = harness.runner.steering.reports
    saliency = harness.runner.steering.pop_report(report).saliency[0]
    assert re.fullmatch("[A-C]-[0-9]{6}(, [A-C]-[0-9]{6}){0,2}.*", text)
    assert len(text) > 12 and saliency["refusals"] > 0
    # Where the grammar leaves one token, that is drawn, whatever its saliency.
    assert any(row[6] for row in saliency["tokens"])


def test_every_sequence_of_a_request_has_a_gate_of_its_own(harness, prompts):
    harness.runner.steering.reports.clear()
    params = SamplingParams(temperature=1.2, seed=3, n=3, max_tokens=8, ignore_eos=True)
    steered = sampling_params(params, {"methods": [STRICT], "report": READ})
    (output,) = harness.llm.generate({"prompt_token_ids": prompts[2]}, steered, use_tqdm=False)
    (name,) = harness.runner.steering.reports
    entries = harness.runner.steering.pop_report(name).saliency
    sequences = {tuple(each.token_ids) for each in output.outputs}
    assert len(sequences) == 3
    assert {tuple(row[1] for row in entry["tokens"]) for entry in entries} == sequences


def test_the_end_is_taken_when_it_is_drawn(harness, prompts):
    """An impossible bar refuses all but it; min_tokens still keeps it from being drawn."""
    sampling = {"logit_bias": {EOS: 30.0}, "ignore_eos": False, "min_tokens": 4}
    job = Job(prompts[0], program(IMPOSSIBLE, report=READ), 12, sampling=sampling)
    (result,) = harness.run([job])
    rows = report_of(harness, job)["tokens"]
    assert result.finish_reason == "stop"
    assert (len(result.tokens), result.tokens[-1]) == (5, EOS)
    assert rows[-1][1] == EOS and rows[-1][4:] == [1, 0, 0]
    # The first token has no history, the second no threshold.
    assert [row[6] for row in rows[2:-1]] == [1] * (len(rows) - 3)


def test_stop_strings_end_a_gated_answer(harness, prompts):
    params = SamplingParams(temperature=0, max_tokens=40, stop=["a"])
    spec = {"methods": [STRICT]}
    (output,) = harness.llm.generate(
        {"prompt_token_ids": prompts[1]}, sampling_params(params, spec), use_tqdm=False
    )
    assert output.outputs[0].finish_reason == "stop"
    assert "a" not in output.outputs[0].text


def test_what_is_not_allowed_is_no_candidate(harness, prompts):
    allowed = [260, 284, 253, 1018, 28, 30, 504]
    sampling = {"allowed_token_ids": allowed, "temperature": 1.0, "seed": 1}
    job = Job(prompts[0], program(IMPOSSIBLE), 8, sampling=sampling)
    (result,) = harness.run([job])
    assert set(result.tokens) <= set(allowed)
    assert report_of(harness, job)["fallbacks"] >= 5


def test_logprobs_are_the_models_own(harness, attention_oracle, prompts):
    """Of refused and accepted tokens alike, and before temperature."""
    prompt = prompts[3]
    sampling = {"temperature": 1.5, "seed": 6, "top_k": 20}
    job = Job(prompt, program(STRICT), 8, sampling=sampling)
    (result,) = harness.run([job])
    assert report_of(harness, job)["refusals"] > 0
    logits = attention_oracle.logits(prompt + result.tokens[:-1])[-8:]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(result.tokens)[:, None])
    assert result.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-3)


def test_requests_beyond_the_limit_wait_and_are_gated(harness, prompts, monkeypatch):
    jobs = [
        Job(prompts[index], program(STRICT), 5 + index, sampling={"temperature": 1.0, "seed": 1})
        for index in range(5)
    ]
    jobs.append(Job(prompts[5], max_tokens=5))
    alone = [harness.run([job])[0].tokens for job in jobs]
    at_once = []
    original = SaliencyPass.saliencies

    def saliencies(self, chosen, candidates):
        at_once.append(len(self.tape.rows))
        return original(self, chosen, candidates)

    monkeypatch.setattr(harness.scheduler, "_most_gated", 2)
    monkeypatch.setattr(SaliencyPass, "saliencies", saliencies)
    results = harness.run(jobs, preempt_after=[3])
    assert [result.tokens for result in results] == alone
    assert max(at_once) == 2
    for job in jobs[:-1]:
        report = harness.runner.steering.pop_report(job.request.report_id)
        assert report.is_complete and report.saliency[0]["draws"] >= job.max_tokens


@pytest.mark.parametrize("finite", [True, False], ids=["raises", "not-a-number"])
def test_a_saliency_that_fails_ends_its_request_alone(harness, prompts, monkeypatch, finite):
    jobs = [Job(prompts[index], program(STRICT), 6) for index in range(4)]
    jobs.append(Job(prompts[4], max_tokens=6))
    expected = [harness.run([job])[0].tokens for job in jobs]
    original = SaliencyPass.saliencies

    def saliencies(self, chosen, candidates):
        values = original(self, chosen, candidates)
        for row, index in enumerate(chosen.tolist()):
            at = self.tape.rows[index]
            if at.prompt_len == len(prompts[2]) and at.position == at.prompt_len + 2:
                if finite:
                    raise RuntimeError("injected")
                values[row] = torch.inf
        return values

    lengths = [len(job.prompt) for job in jobs]
    assert lengths.count(lengths[2]) == 1
    monkeypatch.setattr(SaliencyPass, "saliencies", saliencies)
    results = harness.run(jobs)
    for index, (result, tokens) in enumerate(zip(results, expected, strict=True)):
        if index == 2:
            assert result.finish_reason == "error"
            assert result.tokens == tokens[:3]
            report = harness.runner.steering.pop_report(jobs[2].request.report_id)
            assert report.failed_stage == "sampling" and not report.is_complete
        else:
            assert (result.finish_reason, result.tokens) == ("length", tokens)


def test_sampling_that_bypasses_the_gate_is_noticed(harness, prompts, monkeypatch):
    """The request fails; it is not served ungated."""
    job = Job(prompts[0], program(STRICT), 4)
    sampler = harness.runner.sampler
    original = type(sampler).sample
    monkeypatch.setattr(
        type(sampler),
        "forward",
        _forward_that_samples_by(type(sampler).forward, lambda *args: original(sampler, *args)),
    )
    assert harness.run([job])[0].finish_reason == "error"
    report = harness.runner.steering.pop_report(job.request.report_id)
    assert "without the gate" in report.failure


def _forward_that_samples_by(forward, sample):
    def replaced(self, *args, **kwargs):
        gated = self.sample
        self.sample = sample
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.sample = gated

    return replaced
