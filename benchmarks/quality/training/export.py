"""The trained parts in one file, in the form that `headway.server.models.demo_vlm` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from headway.benchmarks.quality.training.language import LowRankLinear
from headway.server.models.demo_vlm import ALPHA, LOW_RANK, PROJECTOR, RANK, VISION


def save_weights(
    file: Path,
    tower: nn.Module,
    projector: nn.Module,
    changes: Mapping[str, LowRankLinear],
    rank: int,
    alpha: float,
) -> None:
    """Write vision tower, projector and low-rank factors to `file`, in bfloat16."""
    parts = {
        VISION: {
            # Where transformers wraps the tower once more, its names carry that wrapper's.
            name.removeprefix("vision_model."): tensor
            for name, tensor in tower.state_dict().items()
        },
        PROJECTOR: projector.state_dict(),
        LOW_RANK: {
            f"{name}.{factor}": getattr(change, factor)
            for name, change in changes.items()
            for factor in ("a", "b")
        },
    }
    tensors = {
        prefix + name: tensor.detach().to(torch.bfloat16).contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }
    save_file(tensors, file, metadata={"format": "pt", RANK: str(rank), ALPHA: f"{alpha:g}"})
