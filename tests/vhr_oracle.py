"""VHR's automatic choice of heads on a transformers model: float32, eager, no cache.

Written from the formulas of Vision-aware Head Reinforcement (arXiv 2412.13949) on Python's own
`statistics`; shares no code with Headway.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median_low, stdev

import torch
from transformers import LlavaForConditionalGeneration

Heads = Iterable[Sequence[int]]
"""(layer, query head) pairs."""


@dataclass(frozen=True)
class LayerChoice:
    """What the image does to the heads of a layer, and which of them are chosen for it.

    vhd: || z - z_text ||_2 of every head, as it is before outliers are set to 0; ta:
    || z_text ||_2^2. outliers, heads: sorted indices. margin: the smallest relative change of a
    VHD, a TA or a limit that could change the choice; 0 for a tie.
    """

    vhd: list[float]
    ta: list[float]
    outliers: list[int]
    heads: list[int]
    margin: float


def choose(z: torch.Tensor, z_text: torch.Tensor) -> LayerChoice:
    """Choose the heads of a layer from their outputs at the last prompt position.

    z, z_text: [num_heads, head_size], with the image and without.
    """
    pairs = list(zip(z.tolist(), z_text.tolist(), strict=True))
    vhd = [math.dist(with_image, text) for with_image, text in pairs]
    ta = [math.hypot(*text) ** 2 for _, text in pairs]
    vhd_limit, ta_limit = mean(vhd) + stdev(vhd), mean(ta) + stdev(ta)
    outliers = [head for head in range(len(vhd)) if vhd[head] > vhd_limit and ta[head] > ta_limit]
    kept = [0.0 if head in outliers else value for head, value in enumerate(vhd)]
    median = median_low(kept)
    heads = [head for head, value in enumerate(kept) if value > median]
    others = list(kept)
    others.remove(median)  # one head is the median itself
    margin = min(distance(value, median) for value in others)
    for head in range(len(vhd)):
        tests = [(vhd[head], vhd_limit), (ta[head], ta_limit)]
        passed = [distance(*test) for test in tests if test[0] > test[1]]
        failed = [distance(*test) for test in tests if test[0] <= test[1]]
        # One test of an outlier must turn to save it; all failed ones must turn to make one.
        margin = min(margin, max(failed) if failed else min(passed))
    return LayerChoice(vhd, ta, outliers, heads, margin)


def distance(value: float, limit: float) -> float:
    """|value - limit| relative to the limit."""
    if value == limit:
        return 0.0
    return abs(value - limit) / abs(limit) if limit else math.inf


class Stream:
    """The residual stream of one prompt on its way through the decoder, layer by layer."""

    def __init__(self, oracle: VHROracle, embeddings: torch.Tensor) -> None:
        """embeddings: float32 [length, hidden_size]."""
        self.oracle = oracle
        self.hidden = embeddings[None]
        length = len(embeddings)
        self.mask = torch.full((length, length), -math.inf).triu(1)[None, None]
        positions = torch.arange(length)[None]
        self.rotary = oracle.decoder.rotary_emb(self.hidden, positions)

    def read(self, layer: int) -> torch.Tensor:
        """z of the layer at the last position, [num_heads, head_size]; the stream stays as is."""
        with self.oracle.scaled_heads([], 1.0) as z:
            self._through(layer)
        return z[layer][-1]

    def advance(self, layer: int, heads: Sequence[int], alpha: float) -> None:
        """Go through the layer with z of `heads` times alpha at all positions."""
        with self.oracle.scaled_heads([(layer, head) for head in heads], alpha):
            self.hidden = self._through(layer)

    def _through(self, layer: int) -> torch.Tensor:
        module = self.oracle.decoder.layers[layer]
        return module(self.hidden, attention_mask=self.mask, position_embeddings=self.rotary)


class VHROracle:
    """A Llava model whose heads are chosen and scaled by VHR's rule.

    Everywhere input_ids has its image tokens expanded, and pixel_values is [images, 3, size, size].
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model.float().eval()
        self.model.set_attn_implementation("eager")
        self.decoder = self.model.model.language_model
        self.num_layers = len(self.decoder.layers)
        self.num_heads = self.decoder.config.num_attention_heads
        self.image_token = self.model.config.image_token_id

    @torch.no_grad()
    def vhd(
        self,
        input_ids: Sequence[int],
        pixel_values: torch.Tensor,
        layers: Collection[int],
        alpha: float,
        reinforce_baseline: bool = False,
    ) -> list[LayerChoice]:
        """The choice at every layer up to the last of `layers`; only those of `layers` are made.

        With alpha 1 and all layers it is what the unsteered model shows. A layer sees the chosen
        heads of the layers before it scaled at all positions: in the prompt with the image, and
        with reinforce_baseline in the prompt without it too.
        """
        ids = torch.tensor(list(input_ids))
        is_image = ids == self.image_token
        embeddings = self.decoder.embed_tokens(ids)
        features = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        seen = embeddings.clone()
        seen[is_image] = torch.cat(list(features))
        image, text = Stream(self, seen), Stream(self, embeddings[~is_image])
        choices = []
        for layer in range(max(layers) + 1):
            choice = choose(image.read(layer), text.read(layer))
            heads = choice.heads if layer in layers else []
            image.advance(layer, heads, alpha)
            text.advance(layer, heads if reinforce_baseline else [], alpha)
            choices.append(choice)
        return choices

    def select(
        self,
        input_ids: Sequence[int],
        pixel_values: torch.Tensor,
        layers: Collection[int],
        alpha: float,
        reinforce_baseline: bool = False,
    ) -> dict[int, list[int]]:
        """The chosen heads of each layer of `layers`, sorted."""
        choices = self.vhd(input_ids, pixel_values, layers, alpha, reinforce_baseline)
        return {layer: choices[layer].heads for layer in sorted(layers)}

    @torch.no_grad()
    def logits(
        self,
        input_ids: Sequence[int],
        pixel_values: torch.Tensor | None,
        scaled: Heads = (),
        alpha: float = 1.0,
    ) -> torch.Tensor:
        """Next-token logits after every position, float32 [length, vocabulary].

        z of the heads in `scaled` is multiplied by alpha at all positions.
        """
        ids = torch.tensor([list(input_ids)])
        with self.scaled_heads(scaled, alpha):
            return self.model(input_ids=ids, pixel_values=pixel_values, use_cache=False).logits[0]

    def generate(
        self,
        input_ids: Sequence[int],
        pixel_values: torch.Tensor | None,
        scaled: Heads,
        alpha: float,
        max_tokens: int,
    ) -> list[int]:
        """Greedy tokens with the same heads scaled throughout; goes on after an end token."""
        scaled = list(scaled)
        tokens: list[int] = []
        while len(tokens) < max_tokens:
            logits = self.logits([*input_ids, *tokens], pixel_values, scaled, alpha)
            tokens.append(int(logits[-1].argmax()))
        return tokens

    @contextmanager
    def scaled_heads(self, heads: Heads, alpha: float) -> Iterator[dict[int, torch.Tensor]]:
        """Multiply z of `heads` by alpha at all positions of what runs in the block.

        Yields z by layer, filled as layers run: [length, num_heads, head_size], before scaling.
        """
        by_layer: dict[int, list[int]] = {layer: [] for layer in range(self.num_layers)}
        for layer, head in heads:
            by_layer[layer].append(head)
        z: dict[int, torch.Tensor] = {}
        hooks = []

        def scaling(layer: int):
            def scale(module, inputs):
                (joined,) = inputs
                split = joined.unflatten(-1, (self.num_heads, -1))
                z[layer] = split[0].clone()
                split = split.clone()
                split[..., by_layer[layer], :] *= alpha
                return (split.flatten(-2),)

            return scale

        for layer in by_layer:
            projection = self.decoder.layers[layer].self_attn.o_proj
            hooks.append(projection.register_forward_pre_hook(scaling(layer)))
        try:
            yield z
        finally:
            for hook in hooks:
                hook.remove()
