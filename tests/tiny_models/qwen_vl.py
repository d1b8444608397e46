"""Qwen2-VL and Qwen2.5-VL: pictures of any size, positions of three dimensions (M-RoPE)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
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

IMAGE_TOKEN = 16
TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 15,
    "vision_start_token_id": 14,
    "vision_end_token_id": 13,
}
TEXT = {
    **TEXT_SIZES,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],  # of the 16 frequencies: time, height, width
    },
}


def build_2(folder: Path) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(2)
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=TEXT, vision_config=vision, **SPECIAL_IDS)
    return finish(Qwen2VLForConditionalGeneration(config), Qwen2VLProcessor, folder)


def build_2_5(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(3)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 128,
        "intermediate_size": 128,
        "num_heads": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],  # block 0 sees windows of 2 x 2 image tokens
    }
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **SPECIAL_IDS)
    return finish(Qwen2_5_VLForConditionalGeneration(config), Qwen2_5_VLProcessor, folder)


def finish(model: Any, processor_class: Callable[..., Any], folder: Path) -> Any:
    merger = model.model.visual.merger.mlp
    plant_sinks(model.get_input_embeddings(), merger[0], merger[2])
    size = {"shortest_edge": 56 * 56, "longest_edge": 168 * 168}
    processor = processor_class(
        image_processor=Qwen2VLImageProcessorPil(size=size),
        tokenizer=tokenizer_with(dict(zip(SPARE_TOKENS, TOKENS, strict=True))),
        video_processor=Qwen2VLVideoProcessor(size=size),
    )
    return save(model.float(), processor, folder)


def tiny(name: str, architecture: str, build: Callable[[Path], Any], tau: float) -> TinyModel:
    return TinyModel(
        name=name,
        build=build,
        geometry=geometry(architecture),
        picture_token="<|image_pad|>",
        around=("<|vision_start|>", "<|vision_end|>"),
        embedding_id=IMAGE_TOKEN,
        picture_sizes=((112, 84), (84, 168)),
        picture_tokens=(4 * 3, 3 * 6),  # of 28 x 28 pixels each
        pixel_inputs=("pixel_values", "image_grid_thw"),
        tau=tau,
    )


QWEN2_VL = tiny("qwen2-vl", "Qwen2VLForConditionalGeneration", build_2, tau=5.7)
QWEN2_5_VL = tiny("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", build_2_5, tau=4.05)
