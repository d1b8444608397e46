"""The limits of `headway bench soak`, on made-up soaks that keep and break them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from headway.benchmarks.soak_answers import Problem
from headway.benchmarks.soak_checks import Soak, by_kind, by_status, growth, limits
from headway.benchmarks.soak_load import Outcome
from headway.benchmarks.soak_parity import Kept, Parity
from tests.soaks import SECONDS, after, made_soak, spoiled

pytestmark = pytest.mark.unit


def failing(found: Soak) -> list[str]:
    return [limit.name.partition(" (")[0] for limit in limits(found) if limit.is_broken]


def grown(share: float) -> Callable[[Soak], Soak]:
    def change(found: Soak) -> Soak:
        end = 0.9 * SECONDS
        memory = [(at, 2000.0 * (1 + share * (at >= end))) for at, _ in found.memory]
        return replace(found, memory=memory)

    return change


BROKEN = [
    (spoiled(status=500, problem=Problem.SERVER_ERROR), "unexpected 5xx"),
    (
        spoiled(status=500, problem=Problem.SERVER_ERROR, refused=True, steered=False),
        "unexpected 5xx",
    ),
    (spoiled(status=None, problem=Problem.CONNECTION), "connection errors"),
    (spoiled(problem=Problem.ECHO), "steered answers without their echo"),
    (spoiled(problem=Problem.TRACE, steered=False), "unsteered answers that show steering"),
    (spoiled(status=429, problem=Problem.REFUSED), "good requests refused"),
    (spoiled(problem=Problem.INCOMPLETE), "incomplete answers"),
    (
        spoiled(problem=Problem.WRONG_ERROR, refused=True, steered=False),
        "bad requests not refused as they should be",
    ),
    (after("withheld as unsteered", 1.0), "withheld as unsteered"),
    (after("failures of steering", 2.0), "failures of steering"),
    (after("slots in use", 1.0), "slots in use at the end"),
    (after("active steered requests", 1.0), "active steered requests at the end"),
    (after("running requests", 1.0), "running requests at the end"),
    (after("waiting requests", 3.0), "waiting requests at the end"),
    (after("share of the KV cache in use", 0.01), "share of the KV cache in use at the end"),
    (lambda found: replace(found, ended_badly="exit code 3"), "bad ends of the server"),
    (lambda found: replace(found, gone="refused"), "bad ends of the server"),
    (grown(0.051), "growth of memory"),
    (
        lambda found: replace(found, parity=Parity([Kept.EQUAL, Kept.DIFFERS], ["differs: "])),
        "unsteered answers that differ from stock vLLM",
    ),
]


def test_a_good_soak_keeps_every_limit() -> None:
    found = limits(made_soak())
    assert all(limit.is_judged for limit in found), found
    assert failing(made_soak()) == []
    (ties,) = [limit.note for limit in found if "stock" in limit.name]
    assert ties == "of 9; 1 more are ties of stock vLLM itself"


@pytest.mark.parametrize(("spoil", "name"), BROKEN, ids=[name for _, name in BROKEN])
def test_each_limit_can_be_broken_alone(spoil: Callable[[Soak], Soak], name: str) -> None:
    assert failing(spoil(made_soak())) == [name]


def test_what_a_counter_had_before_is_not_of_the_soak() -> None:
    found = made_soak()
    found.before["failures of steering"] = found.after["failures of steering"] = 7.0
    assert failing(found) == []


def test_what_could_not_be_judged_does_not_hold() -> None:
    few = made_soak(memory=[], memory_kind=None, parity=None)
    few.outcomes = [each for each in few.outcomes if not each.steered and not each.refused]
    few.after["slots in use"] = few.after["withheld as unsteered"] = None
    few.after["failures of steering"] = None  # no failure, no series
    open_ = {limit.name.partition(" (")[0] for limit in limits(few) if not limit.is_judged}
    assert open_ == {
        "bad requests not refused as they should be",
        "steered answers without their echo",
        "withheld as unsteered",
        "slots in use at the end",
        "growth of memory",
        "unsteered answers that differ from stock vLLM",
    }
    assert failing(few) == []


def test_nothing_that_a_dead_server_held_is_taken_for_none() -> None:
    found = made_soak()
    found.gone, found.after = "refused", dict.fromkeys(found.after)
    judged = {limit.name.partition(" (")[0] for limit in limits(found) if limit.is_judged}
    assert not judged & {"withheld as unsteered", "failures of steering", "growth of memory"}
    assert not any("at the end" in name for name in judged)


def test_growth_is_of_medians_after_the_warm_up() -> None:
    assert failing(grown(0.049)(made_soak())) == []
    memory = [(float(at), 1000.0 if at < 0.2 * SECONDS else 2000.0) for at in range(600)]
    assert growth(memory, SECONDS) == (2000.0, 2000.0)
    memory[590] = (590.0, 9000.0)  # a spike is no growth
    assert growth(memory, SECONDS) == (2000.0, 2000.0)
    assert growth(memory[:300], SECONDS) is None


def test_a_short_soak_shows_growth_without_a_verdict() -> None:
    memory = [(at / 10, 2000.0 + 300.0 * (at > 500)) for at in range(600)]
    (limit,) = [
        each for each in limits(replace(made_soak(memory=memory), seconds=60.0))
        if "growth" in each.name
    ]  # fmt: skip
    assert limit.value == pytest.approx(0.15)
    assert limit.verdict.startswith("not judged: shorter")


def test_times_are_of_answers_that_came_to_their_end() -> None:
    outcomes = [*made_soak().outcomes, Outcome("one method", 0.0, 99.0, 200, left=True)]
    rows = {row["kind"]: row for row in by_kind(outcomes, SECONDS)}
    assert rows["one method"]["seconds_p99"] == 1.5 and rows["one method"]["first_p50"] == 0.2
    assert rows["one method"]["requests"] == 101 and rows["one method"]["left"] == 1
    assert rows["bad request"]["refused"] == 100 and rows["bad request"]["seconds_p50"] == 0.01
    assert rows["client that leaves"]["seconds_p50"] is None
    answers = [(row["status"], row["reason"], row["answers"]) for row in by_status(outcomes)]
    assert answers == [(200, None, 200), (400, "E_BAD_PARAM", 100)]
