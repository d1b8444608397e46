"""VHR's choice of heads is a function of the prompt, never of what runs beside it.

Alone or in a crowd, in a cold engine or a warm one, preempted or not, a request chooses the same
heads and gives the same answer; and so does a later one that is given those heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings

from headway.benchmarks.quality.scenes import CAPTION_PROMPT
from headway.steering import SteeringProgram
from tests.engine.harness import Harness, Job, Result, program
from tests.engine.schedules import Alone, assert_same, check_schedule, run_drawn, schedules
from tests.engine.test_vhr_auto import ALPHA, DEMO, LENGTH, Asked, auto, report_of

pytestmark = pytest.mark.engine

SOME_HEADS = [[3, 1], [9, 4], [12, 8]]


def explicit(heads: Sequence[Sequence[int]]) -> SteeringProgram:
    method = {"method": "vhr", "alpha": ALPHA, "heads": [list(head) for head in heads]}
    return program(method, geometry=DEMO)


@dataclass
class Answer:
    """What a steered job gave: its output, the heads that were scaled, the positions computed."""

    result: Result
    heads: list[list[int]]
    computed: int


def answer_of(harness: Harness, job: Job, result: Result) -> Answer:
    report = report_of(harness, job)
    return Answer(result, report.heads, report.positions_computed)


def answers(harness: Harness, jobs: Sequence[Job]) -> list[Answer]:
    """Run jobs that choose their heads in one batch."""
    results = harness.run(jobs)
    return [answer_of(harness, job, result) for job, result in zip(jobs, results, strict=True)]


def answer_cold(harness: Harness, job: Job) -> Answer:
    harness.forget_cache()
    return answers(harness, [job])[0]


def same(got: Answer, want: Answer) -> None:
    assert got.heads == want.heads
    assert_same(got.result, want.result)


@pytest.fixture(scope="module")
def crowd(demo_vlm_processor) -> list[Asked]:
    """Some share the picture, some the question, some neither."""
    first, second = ("test_counter", 0), ("test_prior", 1)
    return [
        Asked(demo_vlm_processor, "<image>Is there a lamp in the image?", first),
        Asked(demo_vlm_processor, "<image>Is there a book in the image?", first),
        Asked(demo_vlm_processor, "<image>Is there a lamp in the image?", second),
        Asked(
            demo_vlm_processor, "Look at this picture, all of it: <image>What do you see?", second
        ),
        Asked(demo_vlm_processor, f"<image>{CAPTION_PROMPT}", ("test_counter", 6)),
    ]


@pytest.fixture(scope="module")
def long_prompts(demo_vlm_processor) -> list[list[int]]:
    """Texts of more than 200 tokens, which every step of fewer tokens divides."""
    texts = ["Rivers flow from the hills to the sea. ", "Cats sleep by day and hunt at night. "]
    found = [
        demo_vlm_processor.tokenizer(
            f"<|im_start|>user\n{text * 25}<|im_end|>\n<|im_start|>assistant\n"
        )
        for text in texts
    ]
    assert all(200 < len(each["input_ids"]) < 400 for each in found)
    return [each["input_ids"] for each in found]


def neighbours(long_prompts: Sequence[list[int]]) -> list[Job]:
    return [
        Job(long_prompts[0], None, LENGTH),
        Job(long_prompts[1], explicit(SOME_HEADS), LENGTH),
    ]


@pytest.fixture(scope="module")
def alone(demo_vlm, crowd, long_prompts) -> tuple[list[Answer], list[Result]]:
    """What every job gives alone in a cold engine: those that choose heads, then the others."""
    chosen = [answer_cold(demo_vlm, one.job(auto())) for one in crowd]
    others = []
    for job in neighbours(long_prompts):
        demo_vlm.forget_cache()
        others += demo_vlm.run([job])
    return chosen, others


def test_prompts_alone_tell_apart(alone):
    """Sharing a picture or a question is not sharing the heads: a mix-up would be seen."""
    chosen = [str(answer.heads) for answer in alone[0]]
    assert len(set(chosen)) == len(chosen)


SCHEDULES = [
    {},
    {"step_tokens": 128},
    {"stagger": 1},
    {"stagger": 2, "step_tokens": 128},
    {"preempt_after": [2, 4]},
    {"preempt_after": [3, 6, 9, 12, 15], "stagger": 1, "step_tokens": 128},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_batch_does_not_change_the_choice(demo_vlm, crowd, long_prompts, alone, schedule):
    """Among each other and with long prompts that are divided over steps, in a cold engine."""
    demo_vlm.forget_cache()
    before, after = neighbours(long_prompts)
    jobs = [one.job(auto()) for one in crowd]
    results = demo_vlm.run([before, *jobs[:3], after, *jobs[3:]], **schedule)
    computed = 0
    for job, result, want in zip(jobs, results[1:4] + results[5:], alone[0], strict=True):
        got = answer_of(demo_vlm, job, result)
        same(got, want)
        computed += got.computed
    assert_same(results[0], alone[1][0])
    assert_same(results[4], alone[1][1])
    # Preemption really happened: some positions were computed twice.
    once = sum(answer.computed for answer in alone[0])
    assert computed > once if schedule.get("preempt_after") else computed == once


PROGRAMS = [
    None,
    auto(),
    auto(reinforce_baseline=True),
    auto({"method": "locore", "beta": 4.0}, layers=[2, 8]),
    explicit(SOME_HEADS),
]


@pytest.fixture(scope="module")
def drawn_alone(demo_vlm, crowd) -> Alone:
    return Alone(demo_vlm, lambda prompt, chosen: crowd[prompt].job(PROGRAMS[chosen]))


@settings(run_drawn, max_examples=8)
@given(schedule=schedules(5, len(PROGRAMS), [128, 150, 512], 6, 10))
def test_scheduling_does_not_change_the_answer(drawn_alone, schedule):
    check_schedule(drawn_alone, schedule)


def test_a_warm_cache_is_for_the_same_prompt_only(demo_vlm, crowd, alone):
    """Blocks hold keys and values that the heads have shaped, and the whole prompt chose those."""
    first, same_picture, same_question = crowd[:3]
    demo_vlm.forget_cache()
    demo_vlm.run([first.job(auto())])
    again = answers(demo_vlm, [first.job(auto())])[0]
    same(again, alone[0][0])
    assert again.result.cached >= 32
    for one, want in ((same_picture, alone[0][1]), (same_question, alone[0][2])):
        other = answers(demo_vlm, [one.job(auto())])[0]
        same(other, want)
        assert other.result.cached == 0
    assert demo_vlm.run([first.job(None)])[0].cached == 0


def test_the_reported_heads_repeat_the_answer(demo_vlm, crowd, alone):
    demo_vlm.forget_cache()
    jobs = [one.job(explicit(want.heads)) for one, want in zip(crowd, alone[0], strict=True)]
    for got, want in zip(demo_vlm.run(jobs), alone[0], strict=True):
        assert_same(got, want.result)


def test_alpha_one_is_the_unsteered_answer(demo_vlm, crowd, alone):
    demo_vlm.forget_cache()
    for one, steered in zip(crowd[:3], alone[0][:3], strict=True):
        identity, plain = demo_vlm.run([one.job(auto(alpha=1.0)), one.job(None)])
        assert_same(identity, plain)
        assert plain.logprobs != pytest.approx(steered.result.logprobs, abs=1e-2)


def test_it_composes_with_locore(demo_vlm, crowd, alone):
    """LocoRE edits rows of output tokens only, and so leaves the choice as it is."""
    demo_vlm.forget_cache()
    both = auto({"method": "locore", "beta": 4.0})
    composed = answers(demo_vlm, [one.job(both) for one in crowd])
    for got, want in zip(composed, alone[0], strict=True):
        assert got.heads == want.heads
        assert got.result.logprobs != pytest.approx(want.result.logprobs, abs=1e-3)
