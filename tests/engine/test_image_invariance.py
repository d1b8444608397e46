"""Steering by the image is a function of positions too: chunks through images, tagged blocks.

As test_invariance.py, on the tiny image model, with VAR.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from tests.engine.harness import Result, program
from tests.engine.test_var import LLAVA, QUESTIONS, Question, var

pytestmark = pytest.mark.engine

PROGRAMS = [
    None,
    var(layers=[1, 2, 3]),
    var(layers=[2], p=1.0, compat=None, rho=0.2),
    program(
        {"method": "locore", "beta": 1.0, "layers": [0, 3]},
        {"method": "vhr", "heads": [[1, 3]], "alpha": 1.5},
        geometry=LLAVA,
    ),
]


@pytest.fixture(scope="module")
def questions(llava_folder) -> list[Question]:
    processor = AutoProcessor.from_pretrained(llava_folder)
    return [Question(processor, index) for index in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def alone(llava, questions):
    known: dict[tuple[int, int], Result] = {}

    def result(question: int, chosen: int) -> Result:
        key = question, chosen
        if key not in known:
            llava.forget_cache()
            known[key] = llava.run([questions[question].job(PROGRAMS[chosen])])[0]
        return known[key]

    return result


schedules = st.fixed_dictionaries(
    {
        "jobs": st.lists(
            st.tuples(st.integers(0, len(QUESTIONS) - 1), st.integers(0, len(PROGRAMS) - 1)),
            min_size=1,
            max_size=5,
        ),
        # An image is 16 tokens: these chunks end inside of images.
        "step_tokens": st.sampled_from([7, 12, 17, 40, 1024]),
        "preempt_after": st.lists(st.integers(1, 12), max_size=3, unique=True),
        "stagger": st.integers(0, 3),
        "cold": st.booleans(),
    }
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(schedule=schedules)
def test_scheduling_does_not_change_the_answer(llava, alone, questions, schedule):
    expected = [alone(*pair) for pair in schedule["jobs"]]
    if schedule["cold"]:
        llava.forget_cache()
    jobs = [questions[question].job(PROGRAMS[chosen]) for question, chosen in schedule["jobs"]]
    results = llava.run(
        jobs,
        step_tokens=schedule["step_tokens"],
        preempt_after=schedule["preempt_after"],
        stagger=schedule["stagger"],
    )
    for got, want in zip(results, expected, strict=True):
        assert got.tokens == want.tokens
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


def test_programs_tell_apart(alone):
    for question in range(len(QUESTIONS)):
        results = [alone(question, chosen) for chosen in range(len(PROGRAMS))]
        logprobs = {tuple(round(value, 3) for value in result.logprobs) for result in results}
        assert len(logprobs) == len(PROGRAMS)


def test_tags_are_found_on_blocks_from_the_cache(llava, alone, questions):
    """The second run computes no prompt block anew, and finds the sinks of the first one's."""
    llava.forget_cache()
    llava.run([questions[1].job(PROGRAMS[1])])
    again = llava.run([questions[1].job(PROGRAMS[1])])[0]
    assert again.cached >= 32
    assert again.tokens == alone(1, 1).tokens
    assert again.logprobs == pytest.approx(alone(1, 1).logprobs, abs=1e-4)


def test_blocks_are_not_shared_between_programs_or_pictures(llava, questions):
    llava.forget_cache()
    llava.run([questions[1].job(PROGRAMS[1])])
    assert llava.run([questions[1].job(PROGRAMS[2])])[0].cached == 0
    assert llava.run([questions[1].job(None)])[0].cached == 0
