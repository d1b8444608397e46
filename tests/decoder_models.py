"""vLLM's own decoder layers without an engine: small ones, of random weights, on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "layer_types": ["full_attention"] * 2,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}


class NoAttention(torch.nn.Module):
    """In place of vLLM's attention layer, which asks for a loaded model's configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


@contextmanager
def one_rank() -> Iterator[VllmConfig]:
    """What vLLM's layers look up when they are made and when they run."""
    with pytest.MonkeyPatch.context() as patch:
        group = SimpleNamespace(rank_in_group=0, world_size=1)
        patch.setattr("vllm.distributed.parallel_state._TP", group)
        for name in ("llama", "qwen2", "qwen3", "gemma3"):
            patch.setattr(f"vllm.model_executor.models.{name}.Attention", NoAttention)
        config = VllmConfig()
        with set_current_vllm_config(config):
            yield config


def decoder_layer(kind: str, vllm_config: VllmConfig, prefix: str, **changes: Any) -> Any:
    """One layer of vLLM's model of that kind."""
    config: Any = CONFIGS[kind](**{**SIZES, **changes})
    if kind == "llama":
        return LlamaDecoderLayer(vllm_config, prefix, config)
    if kind == "mistral":
        return MistralDecoderLayer(vllm_config, prefix, config)
    classes = {
        "qwen2": Qwen2DecoderLayer,
        "qwen3": Qwen3DecoderLayer,
        "gemma3": Gemma3DecoderLayer,
    }
    return classes[kind](config, vllm_config.cache_config, None, prefix=prefix)


def decoder_model(
    kind: str, vllm_config: VllmConfig, at: str = "model", **changes: Any
) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    """A model whose decoder is the submodule `at`, and its attention layers by name."""
    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList(
        decoder_layer(kind, vllm_config, f"{at}.layers.{index}", **changes) for index in range(2)
    )
    decoder.norm = RMSNorm(SIZES["hidden_size"])
    owner = model = torch.nn.Module()
    *path, last = at.split(".")
    for name in path:
        setattr(owner, name, torch.nn.Module())
        owner = getattr(owner, name)
    setattr(owner, last, decoder)
    owner.lm_head = ParallelLMHead(SIZES["vocab_size"], SIZES["hidden_size"])
    owner.logits_processor = LogitsProcessor(SIZES["vocab_size"])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2 + 0.1)
    attention = {
        f"{at}.layers.{index}.self_attn.attn": layer.self_attn.attn
        for index, layer in enumerate(decoder.layers)
    }
    return model, attention
