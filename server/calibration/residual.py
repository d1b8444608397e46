"""The residual stream of a transformers model, as it enters each decoder layer.

transformers symbols relied on: `AutoConfig`, `AutoTokenizer`, `AutoModelForCausalLM`,
`AutoModelForImageTextToText`, `MODEL_FOR_CAUSAL_LM_MAPPING`, `PreTrainedModel.get_decoder`,
`PreTrainedConfig.get_text_config`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm


def load_model(name: str) -> tuple[Any, Any]:
    """A model in float32 on the CPU, and its tokenizer.

    name: a directory or a name on the model hub. Of an image-text model, the whole is loaded.
    Raises what transformers raises (OSError, ValueError) for a model it does not know.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    text_only = type(AutoConfig.from_pretrained(name)) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    model = auto.from_pretrained(name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, as a user's message where there is a chat template."""
    if not tokenizer.chat_template:
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    # The template writes the special tokens itself.
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def relative_magnitudes(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """|x[d]| / RMS(x) of the residual stream x entering each layer, for each prompt.

    prompts: token ids. Returns float32 [num_layers, num_tokens, hidden_size] per prompt, with
    RMS(x) = sqrt(mean x^2), before the layer's norm and without its gain.
    Raises ValueError if the model's decoder layers cannot be told.
    """
    layers = decoder_layers(model)
    found = []
    for tokens in tqdm(prompts, desc="residual streams", unit="prompt"):
        entering: dict[int, torch.Tensor] = {}
        with torch.inference_mode(), _observed(layers, entering):
            model(input_ids=torch.tensor([tokens]), use_cache=False)
        stream = torch.stack([entering[layer] for layer in range(len(layers))])
        rms = stream.square().mean(dim=-1, keepdim=True).sqrt()
        found.append(stream.abs() / rms.clamp_min(torch.finfo(torch.float32).tiny))
    return found


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The decoder layers of the language model, in order. Raises ValueError."""
    depth = model.config.get_text_config().num_hidden_layers
    candidates = [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if len(candidates) != 1:
        raise ValueError(f"{type(model).__name__}: its {depth} decoder layers cannot be told")
    return candidates[0]


@contextmanager
def _observed(layers: torch.nn.ModuleList, entering: dict[int, torch.Tensor]) -> Iterator[None]:
    """Put into `entering` what enters each layer: float32 [num_tokens, hidden_size]."""

    def observe(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            entering[layer] = stream[0].float().clone()

        return hook

    handles = [
        layer.register_forward_pre_hook(observe(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
