"""InternVL in transformers' form: a picture in tiles, and as a whole, between <img> and </img>.

As in InternVL3-1B-hf, the language model is a Qwen2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from tests.tiny_models.base import (
    SPARE_TOKENS,
    TEXT_SIZES,
    TinyModel,
    geometry,
    plant_sinks,
    save,
    tokenizer_with,
)

TILE, PATCH = 56, 14
SIZE = {"height": TILE, "width": TILE}
TOKENS_PER_TILE = 4
IMAGE_TOKEN = 16
TOKENS = {
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
}


def build(folder: Path) -> InternVLForConditionalGeneration:
    torch.manual_seed(4)
    config = InternVLConfig(
        vision_config=vision_config(),
        text_config=Qwen2Config(**TEXT_SIZES),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_TILE,
    )
    renamed = dict(zip(SPARE_TOKENS, TOKENS.values(), strict=True))
    tokenizer = tokenizer_with(renamed, extra_special_tokens=TOKENS)
    return save(random_model(config), processor_with(tokenizer), folder)


def vision_config() -> InternVLVisionConfig:
    return InternVLVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        image_size=TILE,
        patch_size=PATCH,
    )


def random_model(config: InternVLConfig) -> InternVLForConditionalGeneration:
    model = InternVLForConditionalGeneration(config).float()
    projector = model.model.multi_modal_projector
    plant_sinks(model.get_input_embeddings(), projector.linear_1, projector.linear_2)
    return model


def processor_with(tokenizer: Any, **normalisation: Any) -> InternVLProcessor:
    """At most four tiles of a picture, and the whole where there are several."""
    tiles = {"crop_to_patches": True, "max_patches": 4}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=SIZE, **tiles, **normalisation),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=SIZE),
        image_seq_length=TOKENS_PER_TILE,
    )


INTERNVL = TinyModel(
    name="internvl",
    build=build,
    geometry=geometry("InternVLForConditionalGeneration"),
    picture_token="<IMG_CONTEXT>",
    embedding_id=IMAGE_TOKEN,
    picture_sizes=((112, 56), (56, 56)),
    picture_tokens=(3 * TOKENS_PER_TILE, TOKENS_PER_TILE),  # two tiles and the whole; one tile
    pixel_inputs=("pixel_values",),
    tau=7.6,
)
