"""Seam: cached blocks that may hold NaN are cleared before anybody else writes to them.

vLLM symbols relied on: `Scheduler._free_request_blocks`, through which blocks leave a request that
ends or is preempted; `BlockPool.get_new_blocks`, through which they reach the next one;
`Scheduler.schedule`; `Request.num_computed_tokens`, `num_in_flight_tokens`; `KVCacheManager`
(`get_block_ids`, `evict_blocks`, `block_pool`, `kv_cache_config`); of the runners
`kv_cache_config.num_blocks`, and `kv_cache` of the modules in
`CompilationConfig.static_forward_context`, whose first dimension are blocks.

A block is not emptied when it is freed, and kernels read beyond the end of a sequence, where what
they find has the weight 0: times NaN that is NaN. vLLM's kernel on CPU does so, and thus what one
request's edit left behind would spoil the answers of others, unsteered ones included.

Tainted are the blocks that a steered request wrote in a step in which it failed, and in one whose
result nobody looked at because the request left meanwhile. They leave the prefix cache as well:
where the step failed, they lack an edit that their hash promises. Those that lie before the first
position that its edits touch are neither: attention is causal, in every model that is steered, and
unsteered requests may share them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.request import Request

from headway.server.engine.text_passes import payload_of

CLEARED_BLOCKS = "headway_cleared_blocks"
"""Attribute of `SchedulerOutput`: ids of the blocks to clear before the step."""


class ClearsTaintedBlocks:
    """Mixed into a scheduler. tainted: ids of blocks; they stay until they are used again."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tainted: set[int] = set()
        self._reused: list[int] = []
        pool = self.kv_cache_manager.block_pool
        get_new_blocks = pool.get_new_blocks

        def noting_reuse(num_blocks: int) -> Any:
            blocks = get_new_blocks(num_blocks)
            if self.tainted:
                reused = self.tainted.intersection(block.block_id for block in blocks)
                self.tainted -= reused
                self._reused += sorted(reused)
            return blocks

        pool.get_new_blocks = noting_reuse

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._reused:
            setattr(output, CLEARED_BLOCKS, tuple(self._reused))
            self._reused = []
        return output

    def _free_request_blocks(self: Any, request: Request) -> None:
        if request.num_in_flight_tokens and payload_of(request) is not None:
            self.spoil(written_blocks(self, request))
        super()._free_request_blocks(request)  # type: ignore[misc]

    def spoil(self: Any, blocks: set[int]) -> None:
        """Take blocks out of the prefix cache, and have them cleared before they are used again."""
        self.kv_cache_manager.evict_blocks(blocks)
        self.tainted |= blocks


def written_blocks(scheduler: Any, request: Request) -> set[int]:
    """Blocks holding positions that a request computed in steps not yet processed.

    Only from the first position on that its edits touch; none where they touch none, which is so
    where tokens are judged and nothing is edited.
    """
    touched = [position for position, _ in (payload_of(request) or {}).get("cache_keys", ())]
    if not touched:
        return set()
    start = max(min(touched), request.num_computed_tokens - request.num_in_flight_tokens)
    manager = scheduler.kv_cache_manager
    written: set[int] = set()
    groups = zip(
        manager.kv_cache_config.kv_cache_groups,
        manager.get_block_ids(request.request_id),
        strict=True,
    )
    for group, block_ids in groups:
        written.update(block_ids[start // group.kv_cache_spec.block_size :])
    return written - {manager.block_pool.null_block.block_id}


@torch.inference_mode()
def clear_blocks(runner: Any, scheduler_output: Any) -> None:
    """Zero the blocks that a step asks for, in all layers; a worker calls it before the step."""
    block_ids = getattr(scheduler_output, CLEARED_BLOCKS, ())
    if not block_ids:
        return
    num_blocks = runner.kv_cache_config.num_blocks
    context = runner.vllm_config.compilation_config.static_forward_context
    for module in context.values():
        cache = getattr(module, "kv_cache", None)
        if not isinstance(cache, torch.Tensor) or not cache.numel():
            continue
        # A kernel may have smaller blocks than the scheduler, several of them in one.
        parts = torch.arange(len(cache) // num_blocks)
        rows = torch.tensor(block_ids)[:, None] * len(parts) + parts
        cache.index_fill_(0, rows.flatten().to(cache.device), 0)
