"""Steering is a function of positions, never of scheduling.

Each drawn schedule (chunk size, batch mates, arrival times, warm or cold prefix cache, forced
preemptions) must give every request the tokens it gets alone in a cold engine, and its logprobs
within 1e-4.
"""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.engine.harness import Job, affine_program, program
from tests.engine.schedules import Alone, assert_same, check_schedule, run_drawn, schedules
from tests.engine.test_oracle import DRAWN
from tests.engine.test_var import text_move

pytestmark = pytest.mark.engine

PROGRAMS = [
    None,
    program({"method": "vhr", "heads": [[3, 1], [4, 0], [11, 7]], "alpha": 2.0}),
    program({"method": "head_ablation", "heads": [[10, h] for h in range(9)]}),
    program(
        {"method": "head_scale", "scales": [[0, 0, 0.5], [15, 2, 1.7], [29, 8, 1.4]]},
        {"method": "vhr", "heads": [[15, 2]], "alpha": 1.2},
    ),
    affine_program(DRAWN[2]),
    program({"method": "locore", "beta": 4.0}),
    program(
        {"method": "emphasis", "spans": [{"tokens": [5, 12]}], "alpha": 0.2},
        {"method": "locore", "beta": 0.5, "history": "any"},
        {"method": "vhr", "heads": [[9, 0]], "alpha": 1.5},
    ),
    text_move([(8, 16)], [507], 20.0, range(12, 29), 0.7),
]
LENGTH = 6
UNTOUCHED_PROMPT = {0, 5}
"""Programs whose prompt rows are those of an unsteered request, and may be shared with it."""


@pytest.fixture(scope="module")
def alone(harness, conversations) -> Alone:
    return Alone(
        harness,
        lambda conversation, chosen: Job(conversations[conversation], PROGRAMS[chosen], LENGTH),
    )


@pytest.fixture(scope="module")
def conversations(oracle, prompts):
    """Prompts longer than a KV block: a shared system prompt, some with several turns."""
    system = {"role": "system", "content": "You are a careful assistant. " * 12}

    def render(*turns: str) -> list[int]:
        roles = ("user", "assistant")
        messages = [system] + [
            {"role": roles[index % 2], "content": text} for index, text in enumerate(turns)
        ]
        return oracle.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    return [
        prompts[9],
        render("What is the capital of France?"),
        render("What is the capital of Spain?"),
        render(
            "What is the capital of France?", "The capital of France is Paris.", "And of Italy?"
        ),
        render(*["Tell me about rivers. They flow from hills to the sea and carry water."] * 3),
    ]


@run_drawn
@given(schedule=schedules(5, len(PROGRAMS), [17, 40, 64, 150, 2048], 6, 14))
def test_scheduling_does_not_change_the_answer(alone, schedule):
    check_schedule(alone, schedule)


def test_programs_tell_apart(alone):
    """The expected answers differ between programs, so a leak between them would be seen."""
    for conversation in range(5):
        results = [alone(conversation, chosen) for chosen in range(len(PROGRAMS))]
        logprobs = {tuple(round(value, 3) for value in result.logprobs) for result in results}
        assert len(logprobs) == len(PROGRAMS)


def test_preemption_really_happens(harness, conversations):
    harness.forget_cache()
    job = Job(conversations[3], PROGRAMS[1], LENGTH)
    harness.run([job], preempt_after=[3])
    report = harness.runner.steering.pop_report(job.request.report_id)
    assert report.is_complete
    assert report.positions_computed > len(conversations[3]) + LENGTH  # some were computed twice


KINDS = [0, 1, 3, 5, 6, 7]
"""One program of every kind of cache key, and two of the kind of the fingerprint alone."""


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_warm_cache_is_shared_only_within_a_program(harness, alone, conversations, first, second):
    harness.forget_cache()
    harness.run([Job(conversations[1], PROGRAMS[first], LENGTH)])
    got = harness.run([Job(conversations[2], PROGRAMS[second], LENGTH)])[0]
    assert_same(got, alone(2, second))
    assert (got.cached > 0) == (first == second or {first, second} <= UNTOUCHED_PROMPT)


def next_turn(harness, prompt: list[int], steered) -> int:
    """Cached tokens of a turn that follows an answer; it must equal the same turn computed cold."""
    harness.forget_cache()
    tokens = harness.run([Job(prompt, steered, 40)])[0].tokens
    turn = prompt + tokens[:-1]
    again = harness.run([Job(turn, steered, 4)])[0]
    harness.forget_cache()
    assert_same(again, harness.run([Job(turn, steered, 4)])[0])
    return again.cached


def test_output_of_locore_is_not_reused_as_prompt(harness, conversations):
    """In the next turn the answer is prompt, and its rows are computed without the edit."""
    assert 0 < next_turn(harness, conversations[3], PROGRAMS[5]) <= len(conversations[3])


def test_a_later_turn_reuses_output_blocks(harness, conversations):
    """Edits at all positions make output rows good prompt rows for the same program."""
    assert next_turn(harness, conversations[3], PROGRAMS[1]) >= len(conversations[3])


def test_the_callers_salt_still_separates(harness, conversations):
    harness.forget_cache()
    for salt, shared in (("a", False), ("b", False), ("a", True), (None, False), (None, True)):
        job = Job(conversations[1], PROGRAMS[1], 2, cache_salt=salt)
        assert (harness.run([job])[0].cached > 0) == shared
