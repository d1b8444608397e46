"""Attention of a layer as a step's plan wants it, around whichever kernel vLLM has for it.

vLLM symbols relied on: `forward` of an attention implementation, called with `layer.layer_name` and
the `output` it writes; `vllm.model_executor.models.utils.extract_layer_index`. vLLM calls attention
through an opaque custom op, so that compiled models pass here too.

Rows of unsteered requests, and of steered ones at layers that they do not edit, come from the base
kernel. Rows whose attention weights are edited come from Headway's kernel, over the same cache; the
base kernel is spared them through the sequence lengths it is given. Head outputs are then scaled
and shifted in place.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from headway.server.engine.step_plan import AttentionCall, current


class SteeringAttention:
    """Mixed into a backend's implementation: attention with the edits of steered requests."""

    num_heads: int
    head_size: int
    scale: float
    attn_type: str
    logits_soft_cap: float | None
    sliding_window: Any
    base_takes_seq_lens = True

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        def base(seq_lens: torch.Tensor | None) -> None:
            metadata = attn_metadata
            if seq_lens is not None:
                metadata = replace(attn_metadata, seq_lens=seq_lens)
            super(SteeringAttention, self).forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, metadata, output, *args, **kwargs
            )

        plan = current.plan
        if plan is None or attn_metadata is None or self.attn_type != AttentionType.DECODER:
            base(None)
            return output
        index = layer_index(layer.layer_name)
        attends, tape = plan.attends(index), plan.tape
        call = None
        if attends or tape is not None:
            call = self._call(query, kv_cache, output, attn_metadata)
        if attends:
            assert call is not None
            plan.edit_attention(index, call, base)
        else:
            base(None)
        plan.edit_head_outputs(index, output)
        if tape is not None:
            assert call is not None
            tape.keep_attention(index, call)
        return output

    def may_pretend(self, metadata: Any) -> bool:
        """Whether other lengths for some sequences leave the others' results as they are."""
        return True

    def _call(
        self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor, metadata: Any
    ) -> AttentionCall:
        shape = len(query), self.num_heads, self.head_size
        window = self.sliding_window
        if isinstance(window, tuple):  # how many keys to the left, and to the right
            window = window[0] + 1 if window[0] >= 0 else -1
        return AttentionCall(
            query.view(shape),
            kv_cache,
            output.view(shape),
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.slot_mapping,
            self.scale,
            self.logits_soft_cap or 0.0,
            window,
            getattr(metadata, "max_query_len", 0),
            getattr(metadata, "max_seq_len", 0),
            self.base_takes_seq_lens and self.may_pretend(metadata),
        )


@lru_cache(maxsize=4096)
def layer_index(layer_name: str) -> int:
    """Index of the decoder layer that an attention layer's name tells, 0-based."""
    return extract_layer_index(layer_name)


def decoder_layers(context: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """Of vLLM's `static_forward_context`: layer name -> attention layer of this model's decoder.

    The context also has the layers of a draft model.
    """
    own = set(model.modules())
    return {
        name: module
        for name, module in context.items()
        if getattr(module, "attn_type", None) == AttentionType.DECODER and module in own
    }
