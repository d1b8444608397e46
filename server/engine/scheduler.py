"""Seam: vLLM's scheduler, with text passes, a limit of gated requests, and the end of failed ones.

vLLM symbols relied on: `Scheduler.update_from_output`, `Scheduler.requests`,
`Scheduler.running`, `Scheduler.kv_cache_manager` (`get_block_ids`) and
`Scheduler.encoder_cache_mismatch_reqs`, a set of requests that `update_from_output` ends with
`FINISHED_ERROR`; `ModelRunnerOutput`, of it `req_id_to_index`, `sampled_token_ids`,
`prompt_logprobs_dict` and `prompt_token_id_logprobs_dict`.

The worker lists failed requests in `FAILED_REQUESTS` of its `ModelRunnerOutput`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from headway.server.engine.gated_request_scheduler import LimitsGatedRequests
from headway.server.engine.tainted_blocks import ClearsTaintedBlocks, written_blocks
from headway.server.engine.text_pass_scheduler import RunsTextPasses

FAILED_REQUESTS = "headway_failed_requests"
"""Attribute of `ModelRunnerOutput`: ids of the requests whose steering failed in this step."""


class _EndsFailedRequests(LimitsGatedRequests, RunsTextPasses, ClearsTaintedBlocks):
    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        failed = getattr(model_runner_output, FAILED_REQUESTS, ())
        for request_id in failed:
            self.text_passes.failed(request_id)
        if failed:
            end_requests(self, failed, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)


class SteeringScheduler(_EndsFailedRequests, Scheduler):
    """vLLM's scheduler with text passes and the end of failed requests."""


class AsyncSteeringScheduler(_EndsFailedRequests, AsyncScheduler):
    """vLLM's asynchronous scheduler with text passes and the end of failed requests."""


def end_requests(scheduler: Any, failed: Iterable[str], model_runner_output: Any) -> None:
    """Have `update_from_output` end the failed requests with an error, without their last output.

    The blocks they wrote in this step, from the first position on that their edits touch, hold keys
    and values that lack an edit, under a hash that promises it, or even NaN: they leave the prefix
    cache and are cleared before they are used again. A request that already shares one ends too,
    and what it wrote behind it is spoiled likewise.
    """
    manager = scheduler.kv_cache_manager
    ids = set(failed) & scheduler.requests.keys()
    ending = [scheduler.requests[request_id] for request_id in ids]
    spoiled: set[int] = set()
    while ending:
        spoiled.update(*(written_blocks(scheduler, request) for request in ending))
        ending = [
            request
            for request in scheduler.running
            if request.request_id not in ids and spoiled & _blocks(manager, request.request_id)
        ]
        ids.update(request.request_id for request in ending)
    scheduler.spoil(spoiled)
    tokens = model_runner_output.sampled_token_ids
    for request_id in ids:
        index = model_runner_output.req_id_to_index.get(request_id)
        if tokens and index is not None:
            tokens[index] = []
        # vLLM asserts that a request without a token has none of these either.
        model_runner_output.prompt_logprobs_dict.pop(request_id, None)
        model_runner_output.prompt_token_id_logprobs_dict.pop(request_id, None)
    scheduler.encoder_cache_mismatch_reqs.update(ids)


def _blocks(manager: Any, request_id: str) -> set[int]:
    return {block for group in manager.get_block_ids(request_id) for block in group}
