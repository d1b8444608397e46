"""Batched generation with transformers, as its users do it: padded on the left, with a KV cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headway.benchmarks.peer_systems.protocol import Answer, Request

TOP = 5
"""How many first tokens an answer tells the log-probabilities of."""


def load_model(path: str, dtype: str) -> Any:
    """A checkpoint on CPU, which never stops at a token of its own accord."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    saved = json.loads((Path(path) / "config.json").read_text())
    # Releases before 5 would silently take their default for what has another name since.
    theta = (saved.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and hasattr(config, "rope_theta"):
        config.rope_theta = theta
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def padded(prompts: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[Any, Any]:
    """Token ids and attention mask [batch, longest prompt], padded on the left."""
    width = max(map(len, prompts))
    ids = [[pad_token] * (width - len(each)) + list(each) for each in prompts]
    mask = [[0] * (width - len(each)) + [1] * len(each) for each in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generate(model: Any, requests: Sequence[Request], output_tokens: int) -> list[Answer]:
    """Greedy answers of `output_tokens` tokens. model: or what wraps one and has `generate`."""
    ids, mask = padded([each["tokens"] for each in requests])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=output_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    values, tokens = torch.log_softmax(output.logits[0].float(), dim=-1).topk(TOP)
    return [
        {
            "token_ids": row.tolist(),
            "first": dict(zip(map(str, top.tolist()), value.tolist(), strict=True)),
        }
        for row, top, value in zip(output.sequences[:, ids.shape[1] :], tokens, values, strict=True)
    ]
