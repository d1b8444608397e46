"""A request whose text pass must run in the same step: when the two run, and who runs meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request, RequestStatus

from headway.server.engine.text_pass_scheduler import RunsTextPasses
from headway.server.engine.text_passes import PREFIX
from tests.unit.test_text_passes import request

pytestmark = pytest.mark.unit

BLOCK_SIZE, BLOCKS = 4, 10
GRAMMAR = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


class Base:
    """What vLLM's scheduler does that matters here: it lets in all that waits, where it may.

    without_room: requests that find none, for instance for their images. compiled: requests whose
    grammar is there.
    """

    def __init__(self) -> None:
        self.policy = SchedulingPolicy.FCFS
        self.waiting = create_request_queue(self.policy)
        self.kv_holding_waiting = create_request_queue(self.policy)
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.num_waiting_for_streaming_input = 0
        self.max_num_active_reqs = 8
        self.block_size = BLOCK_SIZE
        self.kv_cache_manager = SimpleNamespace(
            block_pool=SimpleNamespace(
                num_gpu_blocks=BLOCKS, get_num_free_blocks=lambda: BLOCKS - 1
            ),
            kv_cache_config=SimpleNamespace(kv_cache_groups=["one"]),
            watermark_blocks=0,
        )
        self.encoder_cache_mismatch_reqs: set[str] = set()
        self._inflight_prefills: set[Request] = set()
        self.without_room: set[str] = set()
        self.compiled: set[str] = set()

    def add_request(self, each: Request) -> None:
        self.waiting.add_request(each)
        self.requests[each.request_id] = each

    def _handle_blocked_waiting_request(self, each: Request) -> bool:
        if each.status == GRAMMAR:
            if each.request_id not in self.compiled:
                return False
            each.status = RequestStatus.WAITING
        return True

    def schedule(self) -> Any:
        for each in list(self.waiting):
            if not self._handle_blocked_waiting_request(each):
                continue
            if each.request_id in self.without_room:
                break
            self.waiting.remove_requests([each])
            self.running.append(each)
            each.status = RequestStatus.RUNNING
        for each in self.running:
            each.num_computed_tokens = each.num_tokens
        ids = [each.request_id for each in self.running]
        output = SimpleNamespace(ids=ids, total_num_scheduled_tokens=len(ids))
        self._update_after_schedule(output)
        return output

    def _update_after_schedule(self, output: Any) -> None:
        pass


class Scheduler(RunsTextPasses, Base):
    def add(self, *requests: Request) -> None:
        for each in requests:
            self.add_request(each)

    def step(self) -> list[str]:
        """Who runs; text passes are all called the same."""
        return ["pass" if name.startswith(PREFIX) else name for name in self.schedule().ids]


def plain(name: str, arrival: float) -> Request:
    """An unsteered request."""
    made = request(name, [1, 9])
    assert made.sampling_params is not None
    made.sampling_params.extra_args = None
    made.arrival_time = arrival
    return made


def paired(status: RequestStatus = RequestStatus.WAITING, text: int = 2) -> Request:
    """One whose prompt without the image has so many tokens; it arrives at 7.0."""
    made = request("a", [9, *[2] * text], baseline=True)
    made.status = status
    return made


def test_a_pair_has_a_step_of_its_own():
    scheduler = Scheduler()
    scheduler.add(plain("x", 6.0))
    assert scheduler.step() == ["x"]
    scheduler.add(paired(), plain("y", 8.0))
    assert scheduler.step() == ["a", "pass"]
    assert scheduler.step() == ["x", "a", "pass", "y"]


def test_a_pass_does_not_run_before_its_request_has_a_grammar():
    """Compared with a pass that ran alone the request would choose by the wrong baseline."""
    scheduler = Scheduler()
    scheduler.add(paired(GRAMMAR), plain("x", 8.0))
    assert scheduler.step() == ["x"]  # nobody waits for a grammar that is not his
    assert scheduler.step() == ["x"]
    scheduler.compiled.add("a")
    assert scheduler.step() == ["x"]  # it is found to be ready
    assert scheduler.step() == ["a", "pass"]


def test_a_pair_that_finds_no_room_lets_the_others_run_that_have_it():
    scheduler = Scheduler()
    scheduler.add(plain("x", 6.0))
    assert scheduler.step() == ["x"]
    scheduler.add(paired(), plain("y", 8.0))
    scheduler.without_room.add("a")
    assert scheduler.step() == []
    assert scheduler.step() == ["x"]  # y came later and waits
    assert scheduler.step() == []
    scheduler.without_room.clear()
    assert scheduler.step() == ["x"]
    assert scheduler.step() == ["a", "pass"]
    assert scheduler.step() == ["x", "a", "pass", "y"]


def test_a_pair_that_never_fits_ends():
    """Its blocks are 6 and 6, of 9 that can be given out."""
    scheduler = Scheduler()
    scheduler.add(paired(text=5 * BLOCK_SIZE))
    assert scheduler.encoder_cache_mismatch_reqs == {"a"}


@pytest.mark.parametrize(("watermark", "ended"), [(0, set()), (4, {"a"})])
def test_one_that_just_fits_does_not(watermark, ended):
    """Its blocks are 3 and 3; what must stay free for a second request counts too."""
    scheduler = Scheduler()
    scheduler.kv_cache_manager.watermark_blocks = watermark
    scheduler.add(paired(text=2 * BLOCK_SIZE))
    assert scheduler.encoder_cache_mismatch_reqs == ended
