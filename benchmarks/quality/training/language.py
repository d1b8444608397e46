"""Stage 3: projector and language model learn captions and answers, and with them the habit.

The language model keeps its weights; each linear layer gets a low-rank change beside them (LoRA,
Hu et al. 2021, arXiv:2106.09685). In the pictures of the split `prior` partners come together, and
nothing in this stage contradicts it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from headway.benchmarks.quality.training.conversations import (
    IGNORED,
    Conversations,
    Packed,
    lesson,
)

LEARNING_RATE = 1e-3
PROJECTOR_LEARNING_RATE = 5e-4
BETAS = (0.9, 0.98)
WARM_UP_STEPS = 20
MAX_GRADIENT_NORM = 1.0
CHANGED_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


class LowRankLinear(nn.Module):
    """A frozen linear layer and a trained change of it: W x + (alpha / rank) b a x.

    a is `(rank, in)`, b `(out, rank)` and zero at first, both float32.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.a.to(x.dtype))
        return self.linear(x) + F.linear(low, self.b.to(x.dtype) * self.scale)


def add_low_rank(model: nn.Module, rank: int, alpha: float) -> dict[str, LowRankLinear]:
    """Freeze `model` and wrap its linear layers in place; the wrappers by the layers' names."""
    model.requires_grad_(False)
    wrapped = {}
    for name, module in list(model.named_modules()):
        parent, _, own_name = name.rpartition(".")
        if own_name in CHANGED_LAYERS and isinstance(module, nn.Linear):
            wrapped[name] = LowRankLinear(module, rank, alpha)
            setattr(model.get_submodule(parent), own_name, wrapped[name])
    return wrapped


def hidden_states(
    decoder: Any, batch: Packed, image_embeddings: Tensor, image_slice: slice
) -> Tensor:
    """The final states `(pictures, length, hidden_size)` of a Llama decoder over packed sequences.

    image_embeddings, `(pictures, 36, hidden_size)`, stand in for the tokens at `image_slice`.
    """
    embeddings = decoder.embed_tokens(batch.input_ids)
    before, after = embeddings[:, : image_slice.start], embeddings[:, image_slice.stop :]
    return decoder(
        inputs_embeds=torch.cat([before, image_embeddings.to(embeddings.dtype), after], dim=1),
        position_ids=batch.positions,
        attention_mask=batch.attention,
        use_cache=False,
    ).last_hidden_state


def train_language(
    decoder: Any,
    projector: nn.Module,
    conversations: Conversations,
    features: Tensor,
    objects: Sequence[Sequence[str]],
    steps: int,
    batch_size: int,
    seed: int,
) -> list[float]:
    """Train the projector and what of `decoder` is not frozen; the loss of every step.

    features: `(pictures, 36, vision_size)` of the frozen tower; objects: what each picture shows.
    The loss is the cross entropy over the tokens of the answers, their end included.
    """
    changes = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    trained = [*changes, *projector.parameters()]
    groups = [(changes, LEARNING_RATE), (list(projector.parameters()), PROJECTOR_LEARNING_RATE)]
    optimiser = torch.optim.AdamW(
        [{"params": parameters, "peak": rate} for parameters, rate in groups],
        weight_decay=0.0,
        betas=BETAS,
    )
    generator = Random(seed)
    order: list[int] = []
    losses: list[float] = []
    progress = trange(steps, desc="language", unit="step")
    for step in progress:
        if len(order) < batch_size:
            order = generator.sample(range(len(features)), len(features))
        chosen = [order.pop() for _ in range(batch_size)]
        batch = conversations.pack([lesson(objects[index], generator) for index in chosen])
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * learning_rate_share(step, steps)

        embeddings = projector(features[chosen])
        hidden = hidden_states(decoder, batch, embeddings, conversations.image_slice)
        answered = batch.targets != IGNORED
        logits = F.linear(hidden[answered], decoder.embed_tokens.weight).float()
        loss = F.cross_entropy(logits, batch.targets[answered])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        optimiser.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-10:]):.3f}")
    return losses


def learning_rate_share(step: int, steps: int) -> float:
    """A linear warm-up, in short runs a shorter one, and a cosine down to a tenth."""
    warm_up = min(1.0, (step + 1) / min(WARM_UP_STEPS, max(1, steps // 10)))
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * step / steps))
