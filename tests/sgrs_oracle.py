"""SGRS on a transformers model: saliencies by autograd, dense and without a cache, and the gate.

Written from the formulas of Saliency-Guided Rejection Sampling (arXiv 2601.20279), with the row of
the token that predicts the candidate in place of the candidate's own; shares no code with Headway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.attention_oracle import Layer

ATTENTION = "headway_sgrs_oracle"
"""Under this name transformers finds the attention of the models that are looked into."""

Edit = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, weights [num_heads, length, length]) -> the weights that values are mixed with."""


class Saliencies(NamedTuple):
    """values: [num_candidates], of each candidate; rows: [num_layers, num_candidates, num_keys],
    each of unit L2 norm, or 0 where the gradient is; logits: [vocabulary], of the predicting row.
    """

    values: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor


@dataclass
class Pass:
    """One forward pass: what changes it, and what it leaves behind.

    scale: [num_layers, num_heads], factors on the outputs of heads at all rows.
    """

    edit: Edit | None = None
    scale: torch.Tensor | None = None
    weights: dict[int, torch.Tensor] = field(default_factory=dict)

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one sequence, all tensors [1, heads, length, head_size]; keeps weights."""
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
        scores = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = torch.softmax(scores, dim=-1)
        if self.edit is not None:
            weights = self.edit(module.layer_idx, weights[0])[None]
        self.weights[module.layer_idx] = weights
        output = weights @ value
        if self.scale is not None:
            output = output * self.scale[module.layer_idx].to(output)[:, None, None]
        return output.transpose(1, 2).contiguous(), weights


def saliencies(
    model: Any,
    input_ids: Sequence[int],
    candidates: Sequence[int],
    layers: Sequence[int],
    history_mask: torch.Tensor,
    *,
    edit: Edit | None = None,
    scale: torch.Tensor | None = None,
    row: int = -1,
    loss_row: int = -1,
    **inputs: Any,
) -> Saliencies:
    """The saliency of every candidate for the token after `input_ids`.

    input_ids: the whole context, with image tokens expanded; layers: the target layers;
    history_mask: bool [length]. row: the query position whose weights are looked at, loss_row: the
    one whose logits the candidate is drawn from. inputs: further ones of the model, pixel_values
    for instance. The numbers have the dtype of the model.
    """
    run, logits = forward(model, input_ids, edit, scale, **inputs)
    targets = [run.weights[layer] for layer in layers]
    rows = []
    for candidate in candidates:
        loss = odds_against(logits[loss_row], candidate)
        gradients = torch.autograd.grad(loss, targets, retain_graph=True)
        products = [
            (weights * gradient)[0, :, row].abs().sum(0)
            for weights, gradient in zip(targets, gradients, strict=True)
        ]
        rows.append(torch.stack([normalised(product) for product in products]))
    found = torch.stack(rows, dim=1).detach()
    values = found[..., history_mask].mean(-1).mean(0)
    return Saliencies(values, found, logits[loss_row].detach())


def odds_against(logits: torch.Tensor, candidate: int) -> torch.Tensor:
    """x of L = -log p(candidate) = log(1 + exp(x)), p being a softmax of the logits.

    The gradient of L is that of x times a positive number, which a norm of the row takes out; but
    where p is almost 1, rounding leaves nothing of it.
    """
    others = torch.cat([logits[:candidate], logits[candidate + 1 :]])
    return others.logsumexp(0) - logits[candidate]


def normalised(products: torch.Tensor) -> torch.Tensor:
    """products / || products ||_2 of one row, 0 where the norm is."""
    # The squares of float32 gradients may be too small for float32.
    products = products.double()
    norm = products.norm()
    return products / norm if norm > 0 else products


def forward(
    model: Any,
    input_ids: Sequence[int],
    edit: Edit | None = None,
    scale: torch.Tensor | None = None,
    **inputs: Any,
) -> tuple[Pass, torch.Tensor]:
    """Run the model on one sequence: the pass, and logits [length, vocabulary] with their graph."""
    run = Pass(edit, scale)
    with torch.enable_grad(), attention_of(model, run):
        ids = torch.tensor([list(input_ids)])
        output = model.eval()(input_ids=ids, use_cache=False, **inputs)
    return run, output.logits[0]


@contextmanager
def attention_of(model: Any, run: Pass) -> Iterator[None]:
    """The model's decoder attends by `run` within the block; towers of images are left alone."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    # The models make the masks themselves, causal ones and those of sliding windows.
    AttentionInterface.register(ATTENTION, run.attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def edit_with(*edits: Callable[[torch.Tensor, Layer], None]) -> Edit:
    """Edits of `tests.attention_oracle` that look at positions alone, not at the residual stream.

    Their arithmetic must be differentiable; that of `Locore`, `Emphasis` and `Identity` is.
    """

    def edited(layer: int, weights: torch.Tensor) -> torch.Tensor:
        length = weights.shape[-1]
        seen = Layer(layer, torch.empty(length, 0), torch.ones(length, length).tril().bool())
        weights = weights.clone()
        for edit in edits:
            edit(weights, seen)
        return weights

    return edited


def output_history(length: int, prompt_len: int) -> torch.Tensor:
    """bool [length]: the output positions."""
    return torch.arange(length) >= prompt_len


def text_after_image(input_ids: Sequence[int], image_token: int) -> torch.Tensor:
    """bool [length]: positions after the first image that hold no image token."""
    is_image = torch.tensor(list(input_ids)) == image_token
    first = is_image.long()
    run_ended = (~is_image & (first.cumsum(0) > 0)).cumsum(0) > 0
    return run_ended & ~is_image


def target_layers(num_layers: int) -> list[int]:
    """Layers 6, 7 and 8 of 32, at the same depth of a model of `num_layers`."""
    scaled = {round(layer * num_layers / 32) for layer in (6, 7, 8)}
    return sorted(layer for layer in scaled if layer < num_layers)


class Decision(NamedTuple):
    """What the gate lets through, and how it came to that.

    saliency, threshold: None where there is no history. fallback: whether all draws were refused.
    """

    token: int
    saliency: float | None
    threshold: float | None
    draws: int
    refusals: int
    fallback: bool


def decide(
    order: Sequence[int],
    saliency: Mapping[int, float] | None,
    accepted: Sequence[float],
    alpha: float = 0.6,
    max_resample: int = 3,
    window: int = 5,
    end_tokens: Collection[int] = (),
) -> Decision:
    """The gate's choice for one token.

    order: the candidates as they come when all are drawn without replacement, at temperature 0
    the most likely one first. saliency: of each candidate; None where there is no history, as for
    the first token. accepted: saliencies of the tokens taken so far, each one that had any, the
    latest last.
    """
    if saliency is None:
        return Decision(order[0], None, None, 1, 0, False)
    recent = list(accepted)[-window:]
    threshold = alpha * sum(recent) / len(recent) if recent else 0.0
    drawn = list(order)[:max_resample]
    for refusals, token in enumerate(drawn):
        if token in end_tokens or saliency[token] >= threshold:
            return Decision(token, saliency[token], threshold, refusals + 1, refusals, False)
    best = max(saliency, key=lambda token: saliency[token])
    return Decision(best, saliency[best], threshold, len(drawn), len(drawn), True)
