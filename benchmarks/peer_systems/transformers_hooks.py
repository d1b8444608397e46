"""transformers with hooks and edited attention logits: how the papers' own code steers.

Per row b of the batch, with z the input of o_proj, h the output of a decoder layer and a the
attention logits, before the softmax:

    head_scale  z[b, :, head] *= scale[b, layer, head]             pre-hook on o_proj
    caa         h[b] += strength[b] * vector[b]                    hook on the layer
    locore      a[b, :, i, j] += log(1 + beta[b])                  i, j output, 1 <= i - j <= window
    emphasis    a[b, :, i, j] += log(alpha[b])                     j in the prompt, not in the span

Logits are edited in an attention function of its own, where transformers' eager attention computes
them; the other two run with its default, fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from headway.benchmarks.peer_systems.protocol import Answer, Peer, Request
from headway.benchmarks.peer_systems.transformers_model import generate, load_model

PEER = Peer(
    name="transformers, hooks",
    module="transformers_hooks",
    system="TransformersHooks",
    methods=("head_scale", "locore", "emphasis", "caa"),
    checked=False,
    notes="batched generate, padded on the left; hooks are the user's own code, nothing checks "
    "them; LocoRE and emphasis in eager attention, the others in its default",
)
ATTENTION = "headway_edited_logits"


class TransformersHooks:
    """A model whose rows are steered one by one."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model = load_model(model, dtype)

    def answer(self, requests: Sequence[Request], output_tokens: int) -> list[Answer]:
        """See `protocol.System`."""
        with steered(self.model, requests):
            return generate(self.model, requests, output_tokens)


@contextmanager
def steered(model: Any, requests: Sequence[Request]) -> Iterator[None]:
    """Steer the rows of batches that consist of these requests, padded on the left."""
    with ExitStack() as stack:
        for layer, scales in head_scales(requests, model.config).items():
            attention = model.model.layers[layer].self_attn
            handle = attention.o_proj.register_forward_pre_hook(scaling_hook(scales))
            stack.callback(handle.remove)
        for layer, shift in shifts(requests, model.config).items():
            handle = model.model.layers[layer].register_forward_hook(adding_hook(shift))
            stack.callback(handle.remove)
        edits = LogitEdits(requests)
        if edits.rows:
            stack.enter_context(edited_logits(model, edits))
        yield


def head_scales(requests: Sequence[Request], config: Any) -> dict[int, torch.Tensor]:
    """Layer -> the scale of each head of each row [batch, 1, heads, 1]."""
    found: dict[int, torch.Tensor] = {}
    for row, steering in _asked(requests, "head_scale"):
        for layer, head, scale in steering["scales"]:
            shape = len(requests), 1, config.num_attention_heads, 1
            found.setdefault(layer, torch.ones(shape))[row, 0, head, 0] = scale
    return found


def shifts(requests: Sequence[Request], config: Any) -> dict[int, torch.Tensor]:
    """Layer -> what is added to the residual stream of each row [batch, 1, hidden_size]."""
    found: dict[int, torch.Tensor] = {}
    for row, steering in _asked(requests, "caa"):
        shape = len(requests), 1, config.hidden_size
        shift = found.setdefault(steering["layer"], torch.zeros(shape))
        shift[row, 0] = steering["strength"] * torch.tensor(steering["vector"])
    return found


def scaling_hook(scales: torch.Tensor) -> Callable[..., Any]:
    """A forward pre-hook that scales the heads in the input of o_proj."""

    def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = inputs[0]
        heads = z.unflatten(-1, (scales.shape[2], -1)) * scales.to(z.dtype)
        return (heads.flatten(-2),)

    return hook


def adding_hook(shift: torch.Tensor) -> Callable[..., Any]:
    """A forward hook that adds to the output of a decoder layer."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + shift.to(output[0].dtype), *output[1:])
        return output + shift.to(output.dtype)

    return hook


class LogitEdits:
    """What is added to the attention logits of each row; rows: (row, steering) of those edited."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.width = max(len(each["tokens"]) for each in requests)
        self.pads = [self.width - len(each["tokens"]) for each in requests]
        self.rows = [*_asked(requests, "locore"), *_asked(requests, "emphasis")]
        self._layer_sets: dict[int, set[int]] = {
            row: set(steering["layers"]) for row, steering in self.rows if "layers" in steering
        }
        self._kept: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def bias(self, layer: int, num_queries: int, num_keys: int) -> torch.Tensor | None:
        """What a layer adds, [batch, 1, queries, keys]; None for nothing.

        The queries are the last of the keys' positions. Layers with the same rows share it.
        """
        rows = [
            (row, steering)
            for row, steering in self.rows
            if row not in self._layer_sets or layer in self._layer_sets[row]
        ]
        if not rows:
            return None
        key = (num_queries, num_keys, *(row for row, _ in rows))
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._computed(rows, num_queries, num_keys)
        return self._kept[1]

    def _computed(self, rows: Sequence[Any], num_queries: int, num_keys: int) -> torch.Tensor:
        keys = torch.arange(num_keys)[None]
        queries = torch.arange(num_keys - num_queries, num_keys)[:, None]
        bias = torch.zeros(len(self.pads), 1, num_queries, num_keys)
        for row, steering in rows:
            if steering["method"] == "locore":
                distance = queries - keys
                near = (distance >= 1) & (distance <= steering["window"])
                where = near & (queries >= self.width) & (keys >= self.width)
                value = math.log1p(steering["beta"])
            else:
                start, end = (self.pads[row] + each for each in steering["span"])
                where = (keys < self.width) & ((keys < start) | (keys >= end))
                value = math.log(steering["alpha"])
            bias[row, 0] += value * where
        return bias


@contextmanager
def edited_logits(model: Any, edits: LogitEdits) -> Iterator[None]:
    """Compute attention eagerly, with edited logits."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, Any]:
        key, value = (
            each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value)
        )
        logits = query @ key.transpose(2, 3) * scaling
        if mask is not None:
            logits = logits + mask
        bias = edits.bias(module.layer_idx, query.shape[2], key.shape[2])
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _asked(requests: Sequence[Request], method: str) -> list[tuple[int, dict[str, Any]]]:
    return [
        (row, each["steering"])
        for row, each in enumerate(requests)
        if each["steering"] is not None and each["steering"]["method"] == method
    ]
