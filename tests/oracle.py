"""An independent, slow and obvious steered model: transformers, eager attention, float32.

Shares no code with headway.steering or headway.kernels: edits are plain tuples, applied by hooks
on the input of each layer's output projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HeadEdit = tuple[int, int, float, "Sequence[float] | None"]
"""(layer, query head, scale, shift of head_size values or None)."""


class EagerOracle:
    """A causal language model whose head outputs can be scaled and shifted."""

    def __init__(self, path: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.num_heads = self.model.config.num_attention_heads

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], edits: Sequence[HeadEdit] = ()) -> torch.Tensor:
        """Next-token logits after every position: float32 [len(token_ids), vocabulary]."""
        hooks = []
        by_layer: dict[int, list[HeadEdit]] = {}
        for edit in edits:
            by_layer.setdefault(edit[0], []).append(edit)
        try:
            for layer, layer_edits in by_layer.items():
                projection = self.model.model.layers[layer].self_attn.o_proj
                hooks.append(projection.register_forward_pre_hook(self._hook(layer_edits)))
            return self.model(torch.tensor([list(token_ids)])).logits[0].float()
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, edits: Sequence[HeadEdit]):
        def edit_heads(module, inputs):
            (joined,) = inputs
            heads = joined.clone().unflatten(-1, (self.num_heads, -1))
            for _, head, scale, shift in edits:
                heads[..., head, :] *= scale
                if shift is not None:
                    heads[..., head, :] += torch.tensor(shift)
            return (heads.flatten(-2),)

        return edit_heads
