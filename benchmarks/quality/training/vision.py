"""Stage 1: the vision tower learns to tell the objects apart, patch by patch.

Its pictures hold any object beside any other, so that it sees what is there and expects nothing:
the habit that makes the model hallucinate is the language model's alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from headway.benchmarks.quality.scenes import BACKGROUND, OBJECTS, PATCHES_PER_SIDE
from headway.benchmarks.quality.training.data import Pictures
from headway.server.models.demo_vlm import vision_config

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.98)
WARM_UP_STEPS = 100
MAX_GRADIENT_NORM = 1.0
BACKGROUND_WEIGHT = 0.3
PICTURES_AT_ONCE = 250


class TowerClassifier(nn.Module):
    """The vision tower with two heads that exist for its training only."""

    def __init__(self) -> None:
        super().__init__()
        config = vision_config()
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.patch_head = nn.Linear(config.hidden_size, len(OBJECTS) + 1)
        self.picture_head = nn.Linear(config.hidden_size, len(OBJECTS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of each object's presence `(pictures, 16)` and of the patches' labels
        `(pictures, 36, 17)`, from normalised pixels `(pictures, 3, 96, 96)`."""
        hidden = self.norm(last_hidden_state(self.tower, pixels))
        return self.picture_head(hidden[:, 0]).float(), self.patch_head(hidden[:, 1:]).float()


def last_hidden_state(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """The states `(pictures, 1 + 36, 192)` that LLaVA takes: before the tower's final norm."""
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]


def normalise(images: Tensor) -> Tensor:
    """Pixels as CLIP's image processor makes them: `(pictures, 96, 96, 3)` in [0, 255] to
    float32 `(pictures, 3, 96, 96)`."""
    mean, deviation = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return ((images.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def features(tower: CLIPVisionModel, images: np.ndarray) -> Tensor:
    """What the tower says about each patch: float32 `(pictures, 36, 192)`."""
    tower.eval()
    with torch.no_grad():
        batches = torch.from_numpy(images).split(PICTURES_AT_ONCE)
        return torch.cat([last_hidden_state(tower, normalise(b))[:, 1:].float() for b in batches])


def seen_in_patches(patch_logits: Tensor) -> Tensor:
    """The probability of each object in the patch that is surest of it: `(pictures, 16)`."""
    return patch_logits.log_softmax(-1)[..., :BACKGROUND].amax(1).exp()


def train_tower(
    classifier: TowerClassifier,
    pictures: Pictures,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    precision: torch.dtype,
) -> list[float]:
    """Train tower and heads on `pictures`; the loss of every step.

    The loss sums the classes of the patches (cross entropy), the presence of the objects as the
    patches see it, and their presence as the class token tells it (binary cross entropies, each
    doubled).
    """
    images, labels = torch.from_numpy(pictures.images), torch.from_numpy(pictures.labels)
    presence = torch.from_numpy(pictures.presence())
    optimiser = torch.optim.AdamW(
        classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS
    )
    class_weights = torch.ones(len(OBJECTS) + 1)
    class_weights[BACKGROUND] = BACKGROUND_WEIGHT
    classifier.train()
    losses = []
    order = torch.empty(0, dtype=torch.long)
    progress = trange(steps, desc="vision tower", unit="step")
    for step in progress:
        if len(order) == 0:
            order = torch.randperm(len(pictures), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        pixels, targets = augment(images[chosen], labels[chosen].long(), generator)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)

        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            picture_logits, patch_logits = classifier(normalise(pixels))
        seen = seen_in_patches(patch_logits).clamp(1e-5, 1 - 1e-5)
        loss = (
            F.cross_entropy(patch_logits.flatten(0, 1), targets.flatten(), class_weights)
            + 2 * F.binary_cross_entropy(seen, presence[chosen])
            + 2 * F.binary_cross_entropy_with_logits(picture_logits, presence[chosen])
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), MAX_GRADIENT_NORM)
        optimiser.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    return losses


def learning_rate(step: int, steps: int) -> float:
    """A linear warm-up, in short runs a shorter one, and a cosine down to almost nothing."""
    warm_up = min(1.0, (step + 1) / min(WARM_UP_STEPS, max(1, steps // 10)))
    return LEARNING_RATE * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Other contrast and tints for every picture; other channels and the mirror for half the
    batches. Float pixels in [0, 255], and the labels as the mirror makes them."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(len(images), *shape).uniform_(low, high, generator=generator)

    def coin() -> bool:
        return bool(torch.rand((), generator=generator) < 0.5)

    pixels = images.float()
    if coin():
        pixels = pixels[..., torch.randperm(3, generator=generator)]
    contrast, tint = uniform(0.75, 1.25, 1, 1, 1), uniform(-20, 20, 1, 1, 3)
    pixels = ((pixels - 128) * contrast + 128 + tint).clamp(0, 255)
    if coin():
        grid = labels.unflatten(1, (PATCHES_PER_SIDE, PATCHES_PER_SIDE))
        pixels, labels = pixels.flip(2), grid.flip(2).flatten(1)
    return pixels, labels


def presence_recall(classifier: TowerClassifier, pictures: Pictures) -> float:
    """The share of the objects in `pictures` that some patch names with more than 50 %."""
    classifier.eval()
    with torch.no_grad():
        batches = torch.from_numpy(pictures.images).split(PICTURES_AT_ONCE)
        seen = torch.cat([seen_in_patches(classifier(normalise(batch))[1]) for batch in batches])
    present = torch.from_numpy(pictures.presence()) > 0
    return (seen[present] > 0.5).float().mean().item()
