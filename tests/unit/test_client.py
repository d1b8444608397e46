"""Reports gathered from the workers of several engines."""

from __future__ import annotations

import asyncio

import pytest

from headway.server.engine import client
from headway.server.engine.client import EngineGoneError, SteeringClient
from headway.server.engine.report import EngineReport

pytestmark = pytest.mark.unit


class Core:
    """Stands for vLLM's client of the engine processes."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = None

    async def call_utility_all_async(self, *call):
        self.asked = call
        return self.answers


class Engine:
    errored = False

    def __init__(self, answers):
        self.engine_core = Core(answers)


def counts(edited: int, computed: int, stage: str | None = None) -> dict:
    return EngineReport(1, computed, edited, stage, stage and "why").as_dict()


async def popped(*engines) -> EngineReport | None:
    return await SteeringClient(Engine(list(engines))).pop_report("id")


async def test_ranks_of_one_engine_count_once():
    assert await popped([counts(5, 5), counts(5, 5)]) == EngineReport(1, 5, 5)


async def test_engines_add_up():
    report = await popped([counts(5, 5)], [None], [counts(7, 7)])
    assert report == EngineReport(2, 12, 12)
    assert report.is_complete


async def test_a_failure_on_any_rank_or_engine_counts():
    report = await popped([counts(5, 5), counts(4, 5, "edit")], [counts(7, 7)])
    assert report.failed_stage == "edit"
    assert not report.is_complete


async def test_nobody_saw_the_request():
    assert await popped([None, None], [None]) is None


async def test_the_call_is_the_engine_cores_collective_rpc():
    engine = Engine([[None]])
    await SteeringClient(engine).pop_report("id")
    assert engine.engine_core.asked == ("collective_rpc", "headway_pop_report", None, ("id",), None)


async def test_an_engine_that_dies_leaves_nobody_waiting(monkeypatch):
    """vLLM's call has no answer then, and no error either."""
    monkeypatch.setattr(client, "LIVENESS_SECONDS", 0.01)
    engine = Engine([])
    unanswered = asyncio.Event()

    async def never(*call):
        try:
            await asyncio.Event().wait()
        finally:
            unanswered.set()

    engine.engine_core.call_utility_all_async = never
    asking = asyncio.create_task(SteeringClient(engine).pop_report("id"))
    await asyncio.sleep(0.05)
    assert not asking.done()
    engine.errored = True
    with pytest.raises(EngineGoneError, match="headway_pop_report"):
        await asyncio.wait_for(asking, 2)
    assert unanswered.is_set()


async def test_a_call_ends_with_whoever_asked():
    engine = Engine([])
    cancelled = asyncio.Event()

    async def never(*call):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    engine.engine_core.call_utility_all_async = never
    asking = asyncio.create_task(SteeringClient(engine).statistics())
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(cancelled.wait(), 2)


async def test_what_the_workers_raise_is_raised():
    engine = Engine([])

    async def raises(*call):
        raise RuntimeError("Call to collective_rpc method failed")

    engine.engine_core.call_utility_all_async = raises
    with pytest.raises(RuntimeError, match="collective_rpc"):
        await SteeringClient(engine).load_artifacts([], "me")


@pytest.mark.parametrize(
    ("report", "complete"),
    [
        (EngineReport(1, 0, 0), False),
        (EngineReport(1, 5, 4, positions_missed=1), False),
        (EngineReport(1, 5, 4, by_scope={"all": 4}), False),
        (EngineReport(1, 5, 0, by_scope={}), True),
        (EngineReport(1, 5, 5), True),
        (EngineReport(1, 5, 5, "edit", "why"), False),
    ],
)
def test_complete_means_every_position(report, complete):
    assert report.is_complete is complete
