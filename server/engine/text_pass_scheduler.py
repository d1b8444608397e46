"""Seam: the scheduling of requests whose heads are chosen by their prompt.

vLLM symbols relied on: `Scheduler.add_request`, `finish_requests`, `schedule`,
`_handle_blocked_waiting_request` (asked for every waiting request before it is scheduled),
`_try_schedule_encoder_inputs` (asked for every request with images how many tokens it may run),
`_update_after_schedule`, `update_from_output`, `reset_prefix_cache`; its `waiting`,
`kv_holding_waiting`, `running`, `_inflight_prefills`, `num_waiting_for_streaming_input`,
`max_num_active_reqs`, `policy`, `block_size`, `kv_cache_manager` (`kv_cache_config`,
`watermark_blocks`, `block_pool.num_gpu_blocks` and `get_num_free_blocks`);
`encoder_cache_mismatch_reqs`, whose requests `update_from_output` ends with an error;
`SchedulerOutput.total_num_scheduled_tokens`; `create_request_queue`.

Such a request runs in the same step as its text pass, or in a later one, and its prompt is never
cut; others go on being cut. Where the heads of the pass are to be scaled as well, the two run in
one step that they have to themselves.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.request import Request, RequestStatus

from headway.server.engine.prompt import blocks_for
from headway.server.engine.text_passes import (
    PREFIX,
    TextPasses,
    is_paired,
    must_run_at_once,
    selection_of,
)

logger = logging.getLogger(__name__)


class RunsTextPasses:
    """Mixed into a scheduler."""

    _pair: tuple[Request, ...] = ()
    _held_from = math.inf
    _pair_steps_back = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_passes = TextPasses()

    def add_request(self: Any, request: Request) -> None:
        text = None
        if selection_of(request) is not None and request.request_id not in self.requests:
            text = self.text_passes.take(request, list(self.waiting))
            if text is not None:
                super().add_request(text)  # type: ignore[misc]
        super().add_request(request)  # type: ignore[misc]
        if text is not None and is_paired(request):
            self._end_if_too_large(request, text)

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        pair = self._first_pair() if self.text_passes.running else ()
        # Where the first pair does not fit, nobody who came later gets in before it.
        self._held_from = pair[0].arrival_time if pair else math.inf
        if not pair or self._pair_steps_back or not self._fits(pair):
            self._pair_steps_back = False
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        running, waiting, holding = self.running, self.waiting, self.kv_holding_waiting
        waiting.remove_requests(pair)
        self.running, self._pair = [], pair
        self.waiting = create_request_queue(self.policy)
        self.kv_holding_waiting = create_request_queue(self.policy)
        for request in pair:
            self.waiting.add_request(request)
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            waiting.prepend_requests(self.waiting)
            self.running, self._pair = running + self.running, ()
            self.waiting, self.kv_holding_waiting = waiting, holding
        # What it lacks, such as room for its images, may be in the hands of those that run.
        self._pair_steps_back = not output.total_num_scheduled_tokens
        return output

    def _first_pair(self: Any) -> tuple[Request, ...]:
        """The first waiting request that must run in one step with its text pass, and that pass."""
        for request in self.waiting:
            # Not while its grammar is compiled: the pass alone would be compared with nothing.
            if request.status != RequestStatus.WAITING or not is_paired(request):
                continue
            if must_run_at_once(request) and self._may_start(request):
                text = self.text_passes.pass_of(request)
                if text is not None and text.status == RequestStatus.WAITING:
                    # In this order: where the first cannot run, the second does not either.
                    return request, text
        return ()

    def _may_start(self, request: Request) -> bool:
        """Whether a waiting request may run at all; asked where vLLM's own loop does not."""
        return True

    def _fits(self: Any, pair: tuple[Request, ...]) -> bool:
        active = len(self.running) + self.num_waiting_for_streaming_input
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return bool(
            active + len(pair) <= self.max_num_active_reqs and self._blocks_for(pair) <= free
        )

    def _blocks_for(self: Any, pair: tuple[Request, ...]) -> int:
        """Blocks that must be free for both to be let in."""
        manager = self.kv_cache_manager
        each_group = blocks_for((request.num_tokens for request in pair), self.block_size)
        blocks = len(manager.kv_cache_config.kv_cache_groups) * each_group
        return int(blocks + manager.watermark_blocks)

    def _end_if_too_large(self: Any, request: Request, text: Request) -> None:
        """End a request whose pair never fits, and which everybody behind it would wait for."""
        most = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is never given out
        needed = self._blocks_for((request, text))
        if needed > most:
            message = "request %s and its text pass need %d blocks of the cache, which has %d"
            logger.error(message, request.request_id, needed, most)
            self.encoder_cache_mismatch_reqs.add(request.request_id)

    def _handle_blocked_waiting_request(self: Any, request: Request) -> bool:
        ready: bool = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        if not ready or request in self._pair:
            return ready
        if request.status == RequestStatus.WAITING:
            if request.arrival_time > self._held_from:
                return False
            if is_paired(request) and self.text_passes.runs_for(request):
                return False  # in a step of its own
        return self.text_passes.is_ready(request, self._inflight_prefills)

    def _try_schedule_encoder_inputs(
        self: Any, request: Request, num_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        inputs, num_new_tokens, *rest = super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, *args, **kwargs
        )
        cut = num_computed_tokens + num_new_tokens < request.num_prompt_tokens
        if cut and must_run_at_once(request):
            num_new_tokens = 0
        return inputs, num_new_tokens, *rest

    def finish_requests(self: Any, request_ids: Any, finished_status: Any) -> list[Request]:
        ended: list[Request] = super().finish_requests(  # type: ignore[misc]
            request_ids, finished_status
        )
        # A pass that may not run without its request would wait for ever.
        orphans = [self.text_passes.pass_of(request) for request in ended if is_paired(request)]
        ids = [text.request_id for text in orphans if text is not None]
        super().finish_requests(ids, RequestStatus.FINISHED_ABORTED)  # type: ignore[misc]
        return ended

    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]
        self.text_passes.note_computed()

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        for of_client in outputs.values():
            # Nobody asked for what a text pass says.
            of_client.outputs = [
                each for each in of_client.outputs if not each.request_id.startswith(PREFIX)
            ]
        return outputs

    def reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> bool:
        # Asked for when the weights have changed: what the workers keep is then of no use either.
        self.text_passes.clear()
        reset: bool = super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
        return reset
