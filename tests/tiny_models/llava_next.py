"""LLaVA-NeXT (LLaVA 1.6): a picture as a whole and in tiles, with a newline feature per row.

As in llava-v1.6-mistral-7b-hf, the language model is a Mistral.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
)

from tests.tiny_llava import vllm_name
from tests.tiny_models.base import (
    TEXT_SIZES,
    TinyModel,
    geometry,
    plant_sinks,
    save,
    tokenizer_with,
)

TILE, PATCH = 42, 14
PINPOINTS = [[42, 84], [84, 42], [84, 84]]
IMAGE_TOKEN = 16


def build(folder: Path) -> LlavaNextForConditionalGeneration:
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=64,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=MistralConfig(**TEXT_SIZES, sliding_window=None),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )
    model = LlavaNextForConditionalGeneration(config).float()
    projector = model.model.multi_modal_projector
    plant_sinks(model.get_input_embeddings(), projector.linear_1, projector.linear_2)
    size = {"height": TILE, "width": TILE}
    images = LlavaNextImageProcessorPil(
        size=size, crop_size=size, image_grid_pinpoints=PINPOINTS, do_center_crop=False
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer_with({"<empty_output>": "<image>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return save(model, processor, folder, vllm_name)


LLAVA_NEXT = TinyModel(
    name="llava-next",
    build=build,
    geometry=geometry("LlavaNextForConditionalGeneration"),
    picture_token="<image>",
    embedding_id=IMAGE_TOKEN,
    picture_sizes=((84, 42), (84, 84)),
    # 3 x 3 for the whole; 3 rows of 6 and a newline, or 6 rows of 6 and a newline.
    picture_tokens=(9 + 3 * 7, 9 + 6 * 7),
    pixel_inputs=("pixel_values", "image_sizes"),
    tau=4.1,
)
