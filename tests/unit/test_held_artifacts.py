"""Which artefacts a front end has the workers keep: loading, letting go, and never too much."""

from __future__ import annotations

import asyncio
import gc

import pytest

from headway.server.engine.held_artifacts import HeldArtifacts
from headway.steering import SteeringError
from tests.residual import drawn_artifact

pytestmark = pytest.mark.unit

A, B, C, D = (drawn_artifact(seed, 8) for seed in range(4))
SIZE = A.num_bytes


class Workers:
    """Stands for the workers: what they were told, and how they fail."""

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.loads: list[int] = []
        self.fails = False

    async def load_artifacts(self, wires, holder):
        await asyncio.sleep(0)
        if self.fails:
            raise RuntimeError("no worker")
        self.loads.append(len(wires))
        self.kept |= {wire["digest"] for wire in wires}

    async def unload_artifacts(self, digests, holder):
        await asyncio.sleep(0)
        assert self.kept >= set(digests)
        self.kept -= set(digests)


@pytest.fixture
def workers():
    return Workers()


def digests(*artifacts) -> set[str]:
    return {each.digest for each in artifacts}


async def test_loads_once_whoever_asks(workers):
    held = HeldArtifacts(workers, 10 * SIZE)
    for _ in range(3):
        held.release(await held.acquire([A, B, A]))
    assert workers.loads == [2] and workers.kept == digests(A, B)
    assert held.held_bytes == 2 * SIZE


async def test_requests_at_the_same_time_wait_for_one_load(workers):
    held = HeldArtifacts(workers, 10 * SIZE)
    found = await asyncio.gather(*(held.acquire([A, B]) for _ in range(8)))
    assert workers.loads == [2]
    assert all(set(each) == digests(A, B) for each in found)


async def test_what_was_used_least_recently_goes_first(workers):
    held = HeldArtifacts(workers, 2 * SIZE)
    for artifact in (A, B, A, C):
        held.release(await held.acquire([artifact]))
    assert workers.kept == digests(A, C)


async def test_what_a_request_uses_stays(workers):
    held = HeldArtifacts(workers, 2 * SIZE)
    in_use = await held.acquire([A])
    for artifact in (B, C, D):
        held.release(await held.acquire([artifact]))
    assert workers.kept == digests(A, D)
    with pytest.raises(SteeringError, match="running requests leave") as caught:
        await held.acquire([B, C])
    assert caught.value.status == 429
    assert workers.kept == digests(A, D)
    held.release(in_use)
    held.release(await held.acquire([B, C]))
    assert workers.kept == digests(B, C)


async def test_what_the_workers_have_from_the_start_is_not_loaded(workers):
    held = HeldArtifacts(workers, 0, resident=digests(A))
    assert await held.acquire([A]) == []
    assert not workers.loads


async def test_a_load_that_fails_leaves_nothing_behind(workers):
    held = HeldArtifacts(workers, 2 * SIZE)
    workers.fails = True
    with pytest.raises(RuntimeError, match="no worker"):
        await held.acquire([A, B])
    workers.fails = False
    assert held.held_bytes == 0
    held.release(await held.acquire([C, D]))
    assert workers.kept == digests(C, D)


async def test_a_client_that_leaves_while_loading_frees_what_it_wanted(workers):
    held = HeldArtifacts(workers, 2 * SIZE)
    task = asyncio.ensure_future(held.acquire([A, B]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.release(await held.acquire([C, D]))
    assert held.held_bytes == 2 * SIZE


class FarWorkers(Workers):
    """They carry out what was sent, and answer when they are let, whether anybody waits or not."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = asyncio.Event()

    async def load_artifacts(self, wires, holder):
        self.loads.append(len(wires))
        self.kept |= {wire["digest"] for wire in wires}
        await self.answer.wait()
        if self.fails:
            raise RuntimeError("no worker")


async def leave_while_loading(held: HeldArtifacts, *artifacts) -> None:
    task = asyncio.ensure_future(held.acquire(list(artifacts)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_was_sent_for_a_client_that_left_is_counted():
    workers = FarWorkers()
    held = HeldArtifacts(workers, 2 * SIZE)
    await leave_while_loading(held, A, B)
    assert workers.kept == digests(A, B)
    workers.answer.set()
    held.release(await held.acquire([C, D]))  # there is room for these only without the others
    assert workers.kept == digests(C, D) and held.held_bytes == 2 * SIZE


async def test_a_client_that_left_before_its_turn_has_nothing_loaded():
    workers = FarWorkers()
    held = HeldArtifacts(workers, 10 * SIZE)
    first = asyncio.ensure_future(held.acquire([A]))
    await leave_while_loading(held, B)
    workers.answer.set()
    held.release(await first)
    held.release(await held.acquire([C]))
    assert workers.kept == digests(A, C)


async def test_a_load_that_fails_when_its_client_has_left_makes_no_noise():
    noise = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
    workers = FarWorkers()
    workers.fails = True
    held = HeldArtifacts(workers, 2 * SIZE)
    await leave_while_loading(held, A)
    workers.answer.set()
    await asyncio.sleep(0.01)
    gc.collect()  # when Python would complain of what nobody asked for
    assert not noise and held.held_bytes == 0
