"""Stage 2: the projector learns to say a patch's object as the language model's word for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from headway.benchmarks.quality.scenes import BACKGROUND, OBJECTS

LEARNING_RATE = 1e-3
BATCH_SIZE = 32
BACKGROUND_WEIGHT = 0.3
END_OF_TEXT = 0
"""The token whose embedding stands for an empty patch."""


class Projector(nn.Module):
    """LLaVA's projector, with the names that transformers gives its layers."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        """`(..., vision_size)` to `(..., text_size)`."""
        return self.linear_2(F.gelu(self.linear_1(features)))


def word_embeddings(embedding: Tensor, tokenizer: Any) -> Tensor:
    """What each patch label is to be projected to: float32 `(17, text_size)`.

    An object's is the mean embedding of the tokens of its name.
    """
    words = [embedding[tokenizer(f" {name}").input_ids].float().mean(0) for name in OBJECTS]
    return torch.stack([*words, embedding[END_OF_TEXT].float()])


def align(
    projector: Projector,
    features: Tensor,
    labels: Tensor,
    words: Tensor,
    steps: int,
    generator: torch.Generator,
) -> list[float]:
    """Regress patch features `(pictures, 36, vision_size)` on the `words` of their labels
    `(pictures, 36)`; the loss of every step."""
    optimiser = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    progress = trange(steps, desc="projector", unit="step")
    for step in progress:
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps) + 1e-6
        chosen = torch.randint(len(features), (BATCH_SIZE,), generator=generator)
        target = words[labels[chosen]]
        weight = torch.where(labels[chosen] == BACKGROUND, BACKGROUND_WEIGHT, 1.0)
        projected = projector(features[chosen])
        squared = (weight[..., None] * (projected - target) ** 2).mean() / words.var()
        angle = (weight * (1 - F.cosine_similarity(projected, target, dim=-1))).mean()
        loss = squared + angle
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses
