"""Train the demo model from scratch, on CPU.

    python -m headway.benchmarks.quality.train_demo_vlm weights.safetensors --evaluate 100

Three stages: the vision tower learns the objects, the projector their words, projector and language
model the answers (see the modules of `training`). The result is a file like the one in
`server/models/weights`, where its model card tells what came out of the recipe below.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from headway.benchmarks.environment import has_native_bfloat16
from headway.benchmarks.quality.training.conversations import Conversations
from headway.benchmarks.quality.training.data import pictures
from headway.benchmarks.quality.training.evaluation import DemoModel, yes_rates
from headway.benchmarks.quality.training.export import save_weights
from headway.benchmarks.quality.training.language import add_low_rank, train_language
from headway.benchmarks.quality.training.projector import Projector, align, word_embeddings
from headway.benchmarks.quality.training.vision import (
    TowerClassifier,
    features,
    presence_recall,
    train_tower,
)
from headway.server.models.demo_vlm import assemble
from headway.server.models.smollm2 import ensure_smollm2

NAME = "python -m headway.benchmarks.quality.train_demo_vlm"
VALIDATION_PICTURES = 500


def option(default: int, help: str) -> int:
    """A field of the recipe that the command line offers as an option."""
    made: int = field(default=default, metadata={"help": help})
    return made


@dataclass(frozen=True)
class Recipe:
    """How long and on how much each stage trains; by default as the model card tells."""

    tower_pictures: int = option(24_000, "pictures for the vision tower, of the split vit")
    tower_steps: int = option(1007, "steps of the vision tower on them")
    crowded_pictures: int = option(14_000, "crowded pictures added then, of the split dense")
    crowded_steps: int = option(1143, "steps of the vision tower on all of them")
    tower_batch: int = option(128, "pictures in a step of the vision tower")
    prior_pictures: int = option(6000, "pictures for projector and language model, split prior")
    projector_steps: int = option(600, "steps of the projector alone")
    language_steps: int = option(431, "steps of projector and language model")
    language_batch: int = option(12, "pictures in such a step, with six conversations each")
    rank: int = option(16, "rank of the changes to the language model")
    alpha: int = option(32, "they are scaled by alpha / rank")
    seed: int = option(0, "seed of everything random but the pictures")


SMOKE = Recipe(
    tower_pictures=200,
    tower_steps=16,
    crowded_pictures=60,
    crowded_steps=2,
    tower_batch=32,
    prior_pictures=100,
    projector_steps=60,
    language_steps=8,
    language_batch=2,
)
"""Shows within a minute that all stages run; the model it makes is of no use."""


@dataclass(frozen=True)
class Losses:
    """The training loss of every step, by stage."""

    tower: list[float]
    crowded: list[float]
    projector: list[float]
    language: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    command_line = parser()
    options = command_line.parse_args(arguments)
    if not options.weights.parent.is_dir():
        command_line.error(f"there is no folder {options.weights.parent}")  # now, not in the end
    given = {
        item.name: getattr(options, item.name)
        for item in fields(Recipe)
        if getattr(options, item.name) is not None
    }
    native = "bfloat16" if has_native_bfloat16() else "float32"
    precision = getattr(torch, options.precision or native)
    recipe = replace(SMOKE if options.smoke else Recipe(), **given)
    try:
        train(recipe, options.weights, precision)
    except (OSError, ValueError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    print(f"{options.weights}: SHA-256 {hashlib.sha256(options.weights.read_bytes()).hexdigest()}")
    if options.evaluate:
        evaluate(options.weights, options.evaluate)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=NAME, description="Train the demo model on CPU.")
    made.add_argument("weights", type=Path, help="the safetensors file to write")
    made.add_argument("--smoke", action="store_true", help="tiny sizes where no other are given")
    made.add_argument(
        "--evaluate", type=int, default=0, metavar="N", help="then ask about N test pictures"
    )
    made.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the forward passes (default: bfloat16 if the processor computes in it)",
    )
    for item in fields(Recipe):
        made.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"{item.metadata['help']} (default {item.default})",
        )
    return made


def train(recipe: Recipe, weights: Path, precision: torch.dtype) -> Losses:
    """Run all stages and write the trained parts to `weights`."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)

    classifier = TowerClassifier()
    shown = pictures("vit", recipe.tower_pictures)
    batch = recipe.tower_batch
    tower_losses = train_tower(classifier, shown, recipe.tower_steps, batch, generator, precision)
    shown = shown + pictures("dense", recipe.crowded_pictures)
    crowded_losses = train_tower(
        classifier, shown, recipe.crowded_steps, batch, generator, precision
    )
    validation = pictures("vitval", min(VALIDATION_PICTURES, recipe.tower_pictures))
    print(f"the vision tower finds {presence_recall(classifier, validation):.3f} of the objects")

    base = ensure_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    decoder = LlamaForCausalLM.from_pretrained(base, dtype=precision).model
    changes = add_low_rank(decoder, recipe.rank, recipe.alpha)
    projector = Projector(classifier.tower.config.hidden_size, decoder.config.hidden_size)

    shown = pictures("prior", recipe.prior_pictures)
    seen = features(classifier.tower, shown.images)
    words = word_embeddings(decoder.embed_tokens.weight, tokenizer)
    labels = torch.from_numpy(shown.labels).long()
    projector_losses = align(projector, seen, labels, words, recipe.projector_steps, generator)
    language_losses = train_language(
        decoder,
        projector,
        Conversations(tokenizer),
        seen,
        [shown.names(index) for index in range(len(shown))],
        recipe.language_steps,
        recipe.language_batch,
        recipe.seed,
    )
    names = {f"model.{name}": change for name, change in changes.items()}
    save_weights(weights, classifier.tower, projector, names, recipe.rank, recipe.alpha)
    return Losses(tower_losses, crowded_losses, projector_losses, language_losses)


def evaluate(weights: Path, count: int) -> None:
    """Print how often the trained model says yes to what is there, and to what is not."""
    with tempfile.TemporaryDirectory() as directory:
        assemble(ensure_smollm2(), weights, Path(directory))
        model = DemoModel(Path(directory))
        for split in ("test_prior", "test_counter"):
            rates = yes_rates(model, split, count)
            print(f'{split}: "Yes." to', ", ".join(f"{kind} {r}" for kind, r in rates.items()))


if __name__ == "__main__":
    sys.exit(main())
