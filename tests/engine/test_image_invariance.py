"""Steering by the image is a function of positions too: chunks through images, tagged blocks.

As test_invariance.py, on the tiny image model, with VAR.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from transformers import AutoProcessor

from tests.engine.harness import program
from tests.engine.schedules import Alone, assert_same, check_schedule, run_drawn, schedules
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
def alone(llava, questions) -> Alone:
    return Alone(llava, lambda question, chosen: questions[question].job(PROGRAMS[chosen]))


# An image is 16 tokens: these chunks end inside of images.
@run_drawn
@given(schedule=schedules(len(QUESTIONS), len(PROGRAMS), [7, 12, 17, 40, 1024], 5, 12))
def test_scheduling_does_not_change_the_answer(alone, schedule):
    check_schedule(alone, schedule)


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
    assert_same(again, alone(1, 1))


def test_blocks_are_not_shared_between_programs_or_pictures(llava, questions):
    llava.forget_cache()
    llava.run([questions[1].job(PROGRAMS[1])])
    assert llava.run([questions[1].job(PROGRAMS[2])])[0].cached == 0
    assert llava.run([questions[1].job(None)])[0].cached == 0
