"""Blocks that may hold NaN are cleared when, and only when, somebody gets them again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headway.server.engine.request import EXTRA_ARG
from headway.server.engine.tainted_blocks import (
    CLEARED_BLOCKS,
    ClearsTaintedBlocks,
    clear_blocks,
    written_blocks,
)

pytestmark = pytest.mark.unit

BLOCK_SIZE = 4


class Pool:
    null_block = SimpleNamespace(block_id=0)

    def __init__(self) -> None:
        self.free = list(range(1, 20))

    def get_new_blocks(self, count: int) -> list[Any]:
        return [SimpleNamespace(block_id=self.free.pop(0)) for _ in range(count)]


class Manager:
    """Of one request, whose blocks are 0 (behind its window), 5, 6 and 7."""

    def __init__(self) -> None:
        self.block_pool = Pool()
        spec = SimpleNamespace(block_size=BLOCK_SIZE)
        group = SimpleNamespace(kv_cache_spec=spec)
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[group])
        self.evicted: set[int] = set()

    def get_block_ids(self, request_id: str) -> list[list[int]]:
        return [[0, 5, 6, 7]]

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.evicted |= block_ids


class Base:
    """What vLLM's scheduler does that matters here."""

    def __init__(self) -> None:
        self.kv_cache_manager = Manager()
        self.freed: list[Any] = []

    def schedule(self, wanted: int = 0) -> Any:
        self.kv_cache_manager.block_pool.get_new_blocks(wanted)
        return SimpleNamespace()

    def _free_request_blocks(self, request: Any) -> None:
        self.freed.append(request)


class Scheduler(ClearsTaintedBlocks, Base):
    pass


def request(computed: int, in_flight: int, *touched: int) -> Any:
    """touched: positions from which on it is edited; without one it is not steered."""
    extra = {EXTRA_ARG: {"cache_keys": [(at, "key") for at in touched]}} if touched else None
    return SimpleNamespace(
        request_id="r",
        num_computed_tokens=computed,
        num_in_flight_tokens=in_flight,
        sampling_params=SimpleNamespace(extra_args=extra),
    )


@pytest.mark.parametrize(
    ("computed", "in_flight", "blocks"),
    [(14, 1, {7}), (14, 4, {6, 7}), (14, 14, {5, 6, 7}), (12, 4, {6, 7}), (3, 3, {5, 6, 7})],
)
def test_written_is_what_the_last_step_wrote_to_and_beyond(computed, in_flight, blocks):
    assert written_blocks(Scheduler(), request(computed, in_flight, 0)) == blocks


@pytest.mark.parametrize(
    ("touched", "blocks"),
    [((4,), {5, 6, 7}), ((8, 13), {6, 7}), ((13, 11), {6, 7}), ((12,), {7}), ((16,), set())],
)
def test_of_that_the_blocks_from_the_first_edited_position_on(touched, blocks):
    assert written_blocks(Scheduler(), request(14, 14, *touched)) == blocks


def test_without_an_edit_none_is_written():
    judged = request(14, 14, 0)
    judged.sampling_params.extra_args[EXTRA_ARG]["cache_keys"] = []
    assert written_blocks(Scheduler(), judged) == set()


@pytest.mark.parametrize(
    ("leaves", "tainted"),
    [
        (request(14, 3, 0), {6, 7}),  # in mid-step: nobody looked at what came of it
        (request(14, 0, 0), set()),
        (request(14, 3), set()),
    ],
    ids=["in mid-step", "between steps", "unsteered"],
)
def test_a_request_that_leaves(leaves, tainted):
    scheduler = Scheduler()
    scheduler._free_request_blocks(leaves)
    assert scheduler.tainted == scheduler.kv_cache_manager.evicted == tainted
    assert scheduler.freed == [leaves]


def test_they_are_cleared_once_and_by_the_step_that_uses_them():
    scheduler = Scheduler()
    scheduler.tainted = {2, 4, 17}
    assert getattr(scheduler.schedule(1), CLEARED_BLOCKS, ()) == ()
    assert getattr(scheduler.schedule(3), CLEARED_BLOCKS) == (2, 4)
    assert scheduler.tainted == {17}
    assert getattr(scheduler.schedule(3), CLEARED_BLOCKS, ()) == ()


def runner(*caches: Any) -> Any:
    context = {str(index): SimpleNamespace(kv_cache=cache) for index, cache in enumerate(caches)}
    return SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=6),
        vllm_config=SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=context)
        ),
    )


@pytest.mark.parametrize("parts", [1, 2], ids=["same blocks", "kernel's blocks are halves"])
def test_clearing_reaches_all_layers_and_no_other_block(parts):
    caches = [torch.full((6 * parts, 2, 3), float("nan")) for _ in range(2)]
    strided = torch.full((2, 6 * parts, 3), float("nan")).transpose(0, 1)
    worker = runner(*caches, strided, torch.tensor([]), None)
    clear_blocks(worker, SimpleNamespace())
    assert caches[0].isnan().all()
    clear_blocks(worker, SimpleNamespace(**{CLEARED_BLOCKS: (1, 4)}))
    for cache in (*caches, strided):
        by_block = cache.reshape(6, -1)
        assert [bool((row == 0).all()) for row in by_block] == [
            False,
            True,
            False,
            False,
            True,
            False,
        ]
        assert int(by_block.isnan().all(dim=1).sum()) == 4
