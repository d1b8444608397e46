"""Drawn schedules, and what every one of them must leave as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.engine.harness import Harness, Job, Result

JobOf = Callable[[int, int], Job]
"""Makes the job of a prompt and a program, both by index."""

run_drawn = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def schedules(
    num_prompts: int,
    num_programs: int,
    step_tokens: Sequence[int],
    max_jobs: int,
    last_preemption: int,
) -> st.SearchStrategy[dict[str, Any]]:
    """Jobs as (prompt, program), chunk size, steps to preempt after, arrivals, cold or warm."""
    pair = st.tuples(st.integers(0, num_prompts - 1), st.integers(0, num_programs - 1))
    return st.fixed_dictionaries(
        {
            "jobs": st.lists(pair, min_size=1, max_size=max_jobs),
            "step_tokens": st.sampled_from(step_tokens),
            "preempt_after": st.lists(st.integers(1, last_preemption), max_size=3, unique=True),
            "stagger": st.integers(0, 3),
            "cold": st.booleans(),
        }
    )


class Alone:
    """(prompt, program) -> its result alone in a cold engine, computed once each."""

    def __init__(self, harness: Harness, job_of: JobOf) -> None:
        self.harness, self.job_of = harness, job_of
        self._known: dict[tuple[int, int], Result] = {}

    def __call__(self, prompt: int, chosen: int) -> Result:
        key = prompt, chosen
        if key not in self._known:
            self.harness.forget_cache()
            self._known[key] = self.harness.run([self.job_of(prompt, chosen)])[0]
        return self._known[key]


def assert_same(got: Result, want: Result) -> None:
    """Identical tokens, and logprobs within 1e-4."""
    assert got.tokens == want.tokens
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


def check_schedule(alone: Alone, schedule: dict[str, Any]) -> None:
    """Run a schedule; every job must give what it gives alone."""
    expected = [alone(*pair) for pair in schedule["jobs"]]
    if schedule["cold"]:
        alone.harness.forget_cache()
    results = alone.harness.run(
        [alone.job_of(*pair) for pair in schedule["jobs"]],
        step_tokens=schedule["step_tokens"],
        preempt_after=schedule["preempt_after"],
        stagger=schedule["stagger"],
    )
    for got, want in zip(results, expected, strict=True):
        assert_same(got, want)
