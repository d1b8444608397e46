"""Seam: the weights of linear layers, which vLLM gives up on CPU once it has packed them.

vLLM symbols relied on: `vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`, called
through its module for every linear layer whose weights are loaded.

A saliency pass goes back through the decoder's layers and needs their weights as they were. What is
kept is the tensor that was loaded: a second copy of the decoder's weights beside the packed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers import utils

KEPT = "headway_weight"
"""Attribute of a linear layer: its weight before packing, [out_features, in_features]."""

NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Keep the weights of the decoder layers of a model that is loaded meanwhile."""
    original = utils.dispatch_cpu_unquantized_gemm

    def keep(layer: Any, remove_weight: bool) -> None:
        path = str(getattr(layer, "prefix", "")).split(".")
        if path[-1] in NAMES and "layers" in path:
            setattr(layer, KEPT, layer.weight.data)
        original(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def weight_of(linear: Any) -> torch.Tensor:
    """The weight of a linear layer. Raises ValueError if it was not kept."""
    weight: torch.Tensor = getattr(linear, KEPT, linear.weight.data)
    if weight.numel() == 0:
        raise ValueError(f"the weight of {getattr(linear, 'prefix', 'a layer')} was not kept")
    return weight
