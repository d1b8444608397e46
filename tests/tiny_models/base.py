"""What the tiny checkpoints share: sizes of the language model, tokenizer, sinks, pictures.

Their image features get massive values in SINK_DIMS, and so does the embedding of <|im_start|>, so
that the first token and some image tokens are sinks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer

from headway.server.models.smollm2 import ensure_smollm2
from headway.steering import ModelGeometry
from tests.tiny_llava import picture

SINK_DIMS = [5, 9]
FIRST_TOKEN = 1
"""<|im_start|>, with which every prompt begins."""

TEXT_SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

SPARE_TOKENS = ("<empty_output>", "<jupyter_script>", "<jupyter_output>", "<jupyter_code>")
"""Special tokens of SmolLM2 that no prompt uses, with the ids 16, 15, 14 and 13."""


@dataclass(frozen=True)
class TinyModel:
    """A class of image models, as a checkpoint of random weights.

    build: writes the checkpoint, the same every time, into a folder, and returns transformers'
    model with its weights, float32; processor: transformers' for that folder. picture_token: in a
    prompt's text, where a picture goes; processor_token: the same in the processor's text, where it
    differs; around: text before and after it. embedding_id: of the token that stands for an image
    embedding in the expanded prompt. picture_sizes: (width, height) of two pictures whose numbers
    of tokens are `picture_tokens`. pixel_inputs: keys of the processor's output that the model
    takes.
    """

    name: str
    build: Callable[[Path], Any]
    geometry: ModelGeometry
    picture_token: str
    embedding_id: int
    picture_sizes: tuple[tuple[int, int], ...]
    picture_tokens: tuple[int, ...]
    pixel_inputs: tuple[str, ...]
    tau: float
    around: tuple[str, str] = ("", "")
    processor_token: str | None = None
    processor: Callable[[Path], Any] = AutoProcessor.from_pretrained

    def picture(self, index: int, seed: int) -> Image.Image:
        return picture(seed).resize(self.picture_sizes[index])


def geometry(architecture: str) -> ModelGeometry:
    """The sizes of TEXT_SIZES, written down so that `geometry_of` can be checked against them."""
    return ModelGeometry(3, 4, 2, 32, 128, supports_images=True, architecture=architecture)


def tokenizer_with(renamed: Mapping[str, str], **special: Any) -> Any:
    """SmolLM2's tokenizer with special tokens renamed; special: names of roles, such as pad_token.

    renamed: spare token -> its new text.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (Path(ensure_smollm2()) / name).read_text()
            for old, new in renamed.items():
                content = content.replace(old, new)
            (Path(scratch) / name).write_text(content)
        return AutoTokenizer.from_pretrained(scratch, **special)


def plant_sinks(embeddings: torch.nn.Embedding, *last_projection: torch.nn.Linear) -> None:
    """Make the first token, and some image tokens, sinks; layers as the picture's features pass."""
    with torch.no_grad():
        embeddings.weight[FIRST_TOKEN, SINK_DIMS] = torch.tensor([12.0, -8.0])
        for linear in last_projection:
            for parameter in linear.parameters():
                parameter.normal_(0.0, 0.12)
        last_projection[-1].weight[SINK_DIMS] *= 6


def save(
    model: Any, processor: Any, folder: Path, name_for_vllm: Callable[[str], str] | None = None
) -> Any:
    """Write both into `folder`; return the model. name_for_vllm: of a weight, where they differ."""
    model.save_pretrained(folder)
    if name_for_vllm is not None:
        path = folder / "model.safetensors"
        weights = {name_for_vllm(name): weight for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    processor.save_pretrained(folder)
    return model.eval()
