"""SGRS in the real engine against autograd through transformers, and against the paper's rule."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoProcessor

from headway.server.engine.cpu_plan import CpuStepPlan
from headway.server.engine.saliency_tape import SaliencyTape
from tests import sgrs_oracle
from tests.attention_oracle import Locore
from tests.engine.harness import Harness, Job, Result, program
from tests.engine.saliency_watch import watched_saliencies, worst_error
from tests.engine.test_var import LLAVA, QUESTIONS, Question
from tests.sgrs_oracle import output_history, target_layers, text_after_image
from tests.tiny_llava import IMAGE_TOKEN

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
LENGTH = 4
DEFAULT = target_layers(30)
VHR_HEADS = [[3, 1], [9, 0], [11, 7], [20, 4]]


def sgrs(**options):
    return {"method": "sgrs", **options}


def report_of(harness: Harness, job: Job) -> dict:
    assert job.request is not None
    (saliency,) = harness.runner.steering.pop_report(job.request.report_id).saliency
    return saliency


VARIANTS = [
    (sgrs(), DEFAULT),
    (sgrs(layers=[0, 15, 29], alpha=1.0), [0, 15, 29]),
    (sgrs(layers=[29], top_k=3), [29]),
    (sgrs(layers=[12], max_resample=5), [12]),
]


def test_saliencies_equal_autograd(harness, attention_oracle, prompts):
    """K = 5 and 3, several sets of layers and an unsteered request in one batch."""
    jobs = [
        Job(prompts[index], program(method), LENGTH) for index, (method, _) in enumerate(VARIANTS)
    ]
    with watched_saliencies() as seen:
        results = harness.run([*jobs, Job(prompts[5], max_tokens=LENGTH)])
    worst = 0.0
    for job, result, (_, layers) in zip(jobs, results, VARIANTS, strict=False):
        ids = job.prompt + result.tokens
        history = output_history(len(ids), len(job.prompt))
        assert len({each.position for each in seen if each.job == job.name}) == LENGTH - 1
        error = worst_error(attention_oracle.model, job, ids, history, layers, seen)
        worst = max(worst, error)
    print(f"largest relative error of a saliency: {worst:.2e}")
    assert worst <= TOLERANCE


def test_all_candidates_of_a_lone_request_are_looked_at_together(harness, prompts):
    job = Job(prompts[0], program(sgrs(alpha=5.0)), LENGTH)
    with watched_saliencies() as seen:
        harness.run([job])
    assert [len(each.candidates) for each in seen] == [5] * (LENGTH - 1)


def test_nothing_of_a_step_outlives_it(harness, prompts):
    """Tensors of a whole step wait for no garbage collector, which would be asked too seldom."""
    gated = program(sgrs(), {"method": "locore", "beta": 1.0})

    def alive() -> int:
        return sum(type(each) in (CpuStepPlan, SaliencyTape) for each in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        harness.run([Job(prompts[0], gated, LENGTH), Job(prompts[1], gated, LENGTH + 2)])
        assert alive() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("history", ["output", "after_image"])
def test_saliencies_of_an_image_model(llava, llava_oracle, llava_folder, history):
    processor = AutoProcessor.from_pretrained(llava_folder)
    questions = [Question(processor, index) for index in range(len(QUESTIONS))]
    steered = program(sgrs(layers=[0, 2], history=history), geometry=LLAVA)
    jobs = [question.job(steered, LENGTH) for question in questions]
    with watched_saliencies() as seen:
        results = llava.run(jobs)
    worst = 0.0
    for job, question, result in zip(jobs, questions, results, strict=True):
        ids = question.ids + result.tokens
        if history == "output":
            mask, count = output_history(len(ids), len(question.ids)), LENGTH - 1
        else:
            mask, count = text_after_image(ids, IMAGE_TOKEN), LENGTH
        error = worst_error(
            llava_oracle.model,
            job,
            ids,
            mask,
            [0, 2],
            seen,
            **question.pixels,
        )
        assert len({each.position for each in seen if each.job == job.name}) == count
        worst = max(worst, error)
    print(f"largest relative error of a saliency: {worst:.2e}")
    assert worst <= TOLERANCE


def test_saliencies_are_those_of_the_steered_model(harness, attention_oracle, prompts):
    """VHR and LocoRE in the same request; without them the numbers are others."""
    prompt = prompts[9]
    layers = [2, 10]
    steered = program(
        {"method": "vhr", "heads": VHR_HEADS, "alpha": 1.6},
        {"method": "locore", "beta": 1.5, "history": "any"},
        sgrs(layers=layers),
    )
    job = Job(prompt, steered, LENGTH)
    with watched_saliencies() as seen:
        (result,) = harness.run([job])
    ids = prompt + result.tokens
    history = output_history(len(ids), len(prompt))
    scale = torch.ones(30, 9)
    for layer, head in VHR_HEADS:
        scale[layer, head] = 1.6
    locore = Locore(len(prompt), 1.5, any_history=True, layers=range(8, 14))
    edits = {"edit": sgrs_oracle.edit_with(locore), "scale": scale}

    def error(**edits):
        return worst_error(attention_oracle.model, job, ids, history, layers, seen, **edits)

    assert {each.position for each in seen} == set(range(len(prompt), len(ids) - 1))
    worst = error(**edits)
    print(f"largest relative error of a saliency: {worst:.2e}")
    assert worst <= TOLERANCE
    del seen[1:]
    assert error(edit=edits["edit"]) > 10 * TOLERANCE
    assert error(scale=scale) > 10 * TOLERANCE


def by_the_rule(model, prompt: list[int], count: int, **options) -> list[sgrs_oracle.Decision]:
    """The answer at temperature 0, by the oracle alone."""
    decisions: list[sgrs_oracle.Decision] = []
    tokens: list[int] = []
    for _ in range(count):
        ids = prompt + tokens
        history = output_history(len(ids), len(prompt))
        with torch.no_grad():
            _, logits = sgrs_oracle.forward(model, ids)
        order = logits[-1].topk(5).indices.tolist()
        values = None
        if tokens:
            found = sgrs_oracle.saliencies(model, ids, order, DEFAULT, history).values
            values = dict(zip(order, found.tolist(), strict=True))
        accepted = [each.saliency for each in decisions if each.saliency is not None]
        decisions.append(sgrs_oracle.decide(order, values, accepted, **options))
        tokens.append(decisions[-1].token)
    return decisions


@pytest.fixture(scope="module")
def judged(attention_oracle, prompts):
    """By prompt, an answer with a high bar: some candidates are refused, and some all are."""
    options = {"alpha": 0.85}
    return {
        index: by_the_rule(attention_oracle.model, prompts[index], 7, **options) for index in (0, 5)
    }


def test_the_gate_does_what_the_rule_says(harness, prompts, judged):
    """Tokens, saliencies, thresholds, draws, refusals and fallbacks, position by position."""
    steered = program(sgrs(alpha=0.85), report={"saliency": True})
    jobs = {index: Job(prompts[index], steered, 7) for index in judged}
    results = dict(zip(jobs, harness.run(list(jobs.values())), strict=True))
    for index, job in jobs.items():
        report = report_of(harness, job)
        expected = judged[index]
        assert results[index].tokens == [each.token for each in expected]
        totals = [report[name] for name in ("draws", "refusals", "fallbacks")]
        assert totals == [
            sum(column) for column in zip(*(each[3:] for each in expected), strict=True)
        ]
        for at, (row, decision) in enumerate(zip(report["tokens"], expected, strict=True)):
            position, token, saliency, threshold, *counts = row
            assert (position, token) == (len(prompts[index]) + at, decision.token)
            assert counts == list(decision[3:])
            if decision.saliency is None:
                assert (saliency, threshold) == (None, None)
            else:
                numbers = pytest.approx(decision[1:3], rel=TOLERANCE)
                assert (saliency, threshold) == numbers


def test_the_likeliest_candidate_is_refused_for_the_one_that_is_expected(
    harness, attention_oracle, prompts, judged
):
    """At some position the second candidate is taken because the first is below the threshold."""
    refused = [
        (index, at)
        for index, decisions in judged.items()
        for at, each in enumerate(decisions)
        if each.refusals and not each.fallback
    ]
    assert refused
    assert any(each.fallback for decisions in judged.values() for each in decisions)
    index, at = refused[0]
    prompt, steered = prompts[index], program(sgrs(alpha=0.85))
    plain, gated = harness.run(
        [Job(prompt, max_tokens=at + 1), Job(prompt, steered, max_tokens=at + 1)]
    )
    before = prompt + [each.token for each in judged[index][:at]]
    likeliest = int(attention_oracle.logits(before)[-1].argmax())
    expected = judged[index][at].token
    assert gated.tokens[at] == expected != likeliest


def answers(harness: Harness, prompts, *steered, **sampling) -> list[Result]:
    jobs = [Job(prompts[4], each, 12, sampling=sampling) for each in steered]
    return harness.run(jobs)


def test_reading_saliencies_changes_nothing(harness, prompts):
    """Neither the tokens nor which blocks of the cache are shared."""
    harness.forget_cache()
    prompt = prompts[9] * 2
    only_read = program(report={"saliency": True})
    for sampling in ({}, {"temperature": 1.0, "seed": 5}):
        plain = harness.run([Job(prompt, max_tokens=12, sampling=sampling)])[0]
        job = Job(prompt, only_read, 12, sampling=sampling)
        (read,) = harness.run([job])
        assert (read.tokens, read.logprobs) == (plain.tokens, plain.logprobs)
        assert read.cached >= 32
        report = report_of(harness, job)
        assert (report["draws"], report["refusals"], report["fallbacks"]) == (0, 0, 0)
        assert [row[1] for row in report["tokens"]] == read.tokens
        first, *others = (row[2] for row in report["tokens"])
        assert first is None and all(0 < each <= 1 for each in others)


def test_a_gate_shares_blocks_with_unsteered_requests(harness, prompts):
    harness.forget_cache()
    prompt = prompts[9] * 2
    harness.run([Job(prompt)])
    assert harness.run([Job(prompt, program(sgrs()))])[0].cached >= 32


def test_alpha_zero_is_the_unsteered_answer(harness, prompts):
    steered, plain = answers(harness, prompts, program(sgrs(alpha=0.0)), None)
    assert (steered.tokens, steered.logprobs) == (plain.tokens, plain.logprobs)
