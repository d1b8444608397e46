"""An independent, slow and obvious model whose attention matrices are edited: float32, no cache.

Written from the papers' rules, on transformers' eager models; shares no code with Headway. An edit
gets the whole attention matrix of a layer and changes it in place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

Heads = Collection[tuple[int, int]] | None
"""(layer, head) pairs; None means all."""


@dataclass
class Layer:
    """What an edit sees of a layer: its index, the residual stream entering it, and whom it sees.

    stream: [length, hidden_size]; visible: bool [length, length], causal.
    """

    index: int
    stream: torch.Tensor
    visible: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(len(self.stream))

    def sinks(self, dims: Sequence[int], tau: float, prompt_len: int, strict=False) -> torch.Tensor:
        """bool [length]: prompt tokens with max |x[d]| / sqrt(mean x^2) >= tau."""
        rms = self.stream.pow(2).mean(-1).sqrt()
        phi = self.stream[:, list(dims)].abs().max(-1).values / rms
        return (phi > tau if strict else phi >= tau) & (self.positions < prompt_len)


def chosen(heads: Heads, layer: int, count: int) -> list[int]:
    return [head for head in range(count) if heads is None or (layer, head) in heads]


@dataclass
class Var:
    """VAR by the paper's rule, or as its released code does."""

    image: torch.Tensor  # bool [length]
    prompt_len: int
    sink_dims: Sequence[int]
    layers: Collection[int]
    p: float = 0.6
    rho: float = 0.5
    tau: float = 20.0
    min_visual_mass: float = 0.2
    as_code: bool = False
    met: int = field(default=0, init=False)
    considered: int = field(default=0, init=False)

    def __call__(self, a: torch.Tensor, layer: Layer) -> None:
        if layer.index not in self.layers:
            return
        sinks = layer.sinks(self.sink_dims, self.tau, self.prompt_len, strict=self.as_code)
        keep = self.p if self.as_code else 1 - self.p
        after = int(self.image.nonzero()[0]) < layer.positions
        rows = (after & ~self.image).nonzero().flatten().tolist()
        for head in range(len(a)):
            for row in rows:
                self.considered += 1
                weights = a[head, row]
                visual = float(weights[self.image].sum())
                good = float(weights[self.image & ~sinks].sum())
                if self.as_code:
                    if not (self.image & sinks)[: row + 1].any():
                        continue
                    centric = visual > self.min_visual_mass and (visual - good) / visual <= self.rho
                else:
                    centric = visual >= self.min_visual_mass and good / visual >= self.rho
                if not centric:
                    continue
                self.met += 1
                if good == 0:
                    continue
                freed = (1 - keep) * float(weights[sinks].sum())
                weights[sinks] *= keep
                weights[self.image & ~sinks] *= 1 + freed / good


@dataclass
class Move:
    """A share p of the sinks' weight goes to some tokens, in proportion, at every row."""

    to: torch.Tensor  # bool [length]
    prompt_len: int
    sink_dims: Sequence[int]
    tau: float
    layers: Collection[int]
    p: float

    def __call__(self, a: torch.Tensor, layer: Layer) -> None:
        if layer.index not in self.layers:
            return
        sinks = layer.sinks(self.sink_dims, self.tau, self.prompt_len)
        target = self.to & ~sinks
        good = a[..., target].sum(-1, keepdim=True)
        freed = torch.where(good > 0, self.p * a[..., sinks].sum(-1, keepdim=True), 0.0)
        kept = torch.where(good > 0, 1 - self.p, 1.0)
        a[..., sinks] *= kept
        a[..., target] *= 1 + freed / good.clamp_min(1e-38)


@dataclass
class Locore:
    """Rows of output tokens: weights of the `window` tokens before them times 1 + beta."""

    prompt_len: int
    beta: float = 0.15
    window: int = 8
    layers: Collection[int] = ()
    heads: Heads = None
    renormalize: bool = True
    any_history: bool = False

    def __call__(self, a: torch.Tensor, layer: Layer) -> None:
        if layer.index not in self.layers and (self.heads is None or self.layers):
            return
        query, key = layer.positions[:, None], layer.positions[None, :]
        near = (query - key >= 1) & (query - key <= self.window) & (query >= self.prompt_len)
        if not self.any_history:
            near = near & (key >= self.prompt_len)
        for head in chosen(self.heads, layer.index, len(a)):
            a[head] = torch.where(near, a[head] * (1 + self.beta), a[head])
            if self.renormalize:
                a[head] /= a[head].sum(-1, keepdim=True)


@dataclass
class Emphasis:
    """PASTA: weights of prompt tokens outside the marked ones times alpha, renormalised."""

    marked: torch.Tensor  # bool [length]
    prompt_len: int
    alpha: float = 0.01
    heads: Heads = None

    def __call__(self, a: torch.Tensor, layer: Layer) -> None:
        rest = ~self.marked & (layer.positions < self.prompt_len)
        for head in chosen(self.heads, layer.index, len(a)):
            a[head][:, rest] *= self.alpha
            a[head] /= a[head].sum(-1, keepdim=True)


@dataclass
class Uniform:
    """The same weight on every visible token."""

    heads: Heads

    def __call__(self, a: torch.Tensor, layer: Layer) -> None:
        for head in chosen(self.heads, layer.index, len(a)):
            a[head] = layer.visible / layer.visible.sum(-1, keepdim=True)


@dataclass
class Identity:
    """A share u of the weight on the token itself."""

    heads: Heads
    u: float = 1.0

    def __call__(self, a: torch.Tensor, layer: Layer) -> None:
        for head in chosen(self.heads, layer.index, len(a)):
            a[head] = (1 - self.u) * a[head] + self.u * torch.eye(len(layer.stream))


@dataclass
class Scale:
    """A factor on the output of heads, and so on their weights; the last edit of a list."""

    heads: Heads
    factor: float

    def __call__(self, a: torch.Tensor, layer: Layer) -> None:
        for head in chosen(self.heads, layer.index, len(a)):
            a[head] *= self.factor


class AttentionOracle:
    """A transformers model (Llama, or Llava with one) with edited attention."""

    def __init__(self, model: Any) -> None:
        self.model = model.float().eval()
        # Registered under a name of its own, so that other models of the process are left alone.
        name = f"headway_oracle_{id(self)}"
        AttentionInterface.register(name, self._attention)
        self.decoder = getattr(model, "language_model", None) or model.model
        if hasattr(self.decoder, "language_model"):
            self.decoder = self.decoder.language_model
        self.decoder.config._attn_implementation = name
        self.edits: Sequence[Any] = ()
        self.streams: dict[int, torch.Tensor] = {}
        self.row_sums: list[torch.Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    @torch.no_grad()
    def logits(
        self, token_ids: Sequence[int], edits: Sequence[Any] = (), **inputs: Any
    ) -> torch.Tensor:
        """Next-token logits after every position, float32 [length, vocabulary]."""
        self.edits, self.row_sums = edits, []
        ids = torch.tensor([list(token_ids)])
        return self.model(input_ids=ids, use_cache=False, **inputs).logits[0].float()

    def _hook(self, index: int):
        def keep(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.streams[index] = hidden[0]

        return keep

    def _attention(self, module, query, key, value, attention_mask, scaling, **_: Any):
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)[0]
        value = value.repeat_interleave(group, dim=1)[0]
        length = query.shape[2]
        visible = torch.ones(length, length).tril().bool()
        scores = query[0] @ key.transpose(1, 2) * scaling
        a = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
        layer = Layer(module.layer_idx, self.streams[module.layer_idx], visible)
        for edit in self.edits:
            edit(a, layer)
        self.row_sums.append(a.sum(-1))
        return (a @ value).transpose(0, 1)[None], a[None]
