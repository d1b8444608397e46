"""How a demo model answers in transformers, unsteered: the check at the end of a training."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from headway.benchmarks.quality.scenes import OBJECTS, PARTNER, question, scene
from headway.benchmarks.quality.training.conversations import POSITIVE, Conversations
from headway.benchmarks.quality.training.language import hidden_states

PICTURES_AT_ONCE = 10
MAX_NEW_TOKENS = 40


class DemoModel:
    """A checkpoint as `assemble` writes it, in float32 on CPU."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self.processor = AutoProcessor.from_pretrained(directory)
        self.conversations = Conversations(self.processor.tokenizer)

    def answer(self, image: Image.Image, prompt: str) -> str:
        """The greedy answer to one prompt about one picture."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(images=[image], text=[text], return_tensors="pt")
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return self.processor.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def margins(self, images: list[Image.Image], asked: list[list[str]]) -> list[list[float]]:
        """By how much the logit of "Yes" exceeds that of "No" for each object asked for."""
        parts: Any = self.model.model
        batch = self.conversations.pack(
            [[(question(name), POSITIVE) for name in names] for names in asked]
        )
        with torch.no_grad():
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            states = parts.vision_tower(pixel_values=pixels, output_hidden_states=True)
            embeddings = parts.multi_modal_projector(states.hidden_states[-1][:, 1:])
            image_slice = self.conversations.image_slice
            hidden = hidden_states(parts.language_model, batch, embeddings, image_slice)
            words = parts.language_model.embed_tokens.weight
            difference = words[self.conversations.yes] - words[self.conversations.no]
            margins = F.linear(hidden, difference[None])[..., 0]
        return [margins[picture, places].tolist() for picture, places in enumerate(batch.answers)]


@dataclass(frozen=True)
class Rate:
    """How many of the questions asked were answered with "Yes."."""

    yes: int
    asked: int

    def __str__(self) -> str:
        share = f"{self.yes / self.asked:.3f}" if self.asked else "none"
        return f"{share} of {self.asked}"


def yes_rates(model: DemoModel, split: str, count: int) -> dict[str, Rate]:
    """How often the model says yes to objects of the first `count` pictures of a split.

    Keys: "present" for the objects that are there, "partner" for the absent partners of those, and
    "other" for as many random ones of the remaining absent objects as are present.
    """
    yes: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for start in tqdm(range(0, count, PICTURES_AT_ONCE), desc=f"asking {split}", unit="batch"):
        indices = range(start, min(start + PICTURES_AT_ONCE, count))
        scenes = [scene(split, index) for index in indices]
        questions = [
            kinds_of_questions(made.objects, Random(index))
            for index, made in zip(indices, scenes, strict=True)
        ]
        names = [[name for _, name in of_picture] for of_picture in questions]
        margins = model.margins([made.image for made in scenes], names)
        for of_picture, values in zip(questions, margins, strict=True):
            for (kind, _), margin in zip(of_picture, values, strict=True):
                asked[kind] += 1
                yes[kind] += margin > 0
    return {kind: Rate(yes[kind], asked[kind]) for kind in ("present", "partner", "other")}


def kinds_of_questions(objects: tuple[str, ...], generator: Random) -> list[tuple[str, str]]:
    """The questions about one picture: kind, as in `yes_rates`, and object."""
    partners = [PARTNER[name] for name in objects if PARTNER[name] not in objects]
    others = [name for name in OBJECTS if name not in objects and name not in partners]
    chosen = generator.sample(others, min(len(objects), len(others)))
    kinds = {"present": objects, "partner": partners, "other": chosen}
    return [(kind, name) for kind, names in kinds.items() for name in names]
