"""The slot tables of one worker, sized and cut as vLLM's configuration says.

vLLM symbols relied on: `ModelConfig.get_layers_start_end_indices` and `max_model_len`,
`SchedulerConfig.max_num_seqs`, `vllm.distributed.get_tp_group` and its `all_gather`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from vllm.distributed import get_tp_group

from headway.server.engine.geometry import geometry_of
from headway.server.engine.slots import SlotTables

Tables = TypeVar("Tables", bound=SlotTables)


def worker_tables(
    kind: type[Tables], vllm_config: Any, device: str | torch.device = "cpu", **options: Any
) -> Tables:
    """Tables of this kind for the layers and heads of this worker; options: others of theirs."""
    model, group = vllm_config.model_config, get_tp_group()
    return kind(
        geometry_of(vllm_config),
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_len=model.max_model_len,
        layers=range(*model.get_layers_start_end_indices(vllm_config.parallel_config)),
        rank=group.rank_in_group,
        world_size=group.world_size,
        device=device,
        **options,
    )


def gather_heads(tensor: torch.Tensor) -> torch.Tensor:
    """Join the last dimension of a tensor over the tensor-parallel group."""
    gathered: torch.Tensor = get_tp_group().all_gather(tensor, dim=-1)
    return gathered
