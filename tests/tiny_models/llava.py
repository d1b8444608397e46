"""LLaVA-1.5: the checkpoint of `tests.tiny_llava`, described as the others are."""

from __future__ import annotations

from headway.steering import ModelGeometry
from tests import tiny_llava
from tests.tiny_models.base import TinyModel

LLAVA = TinyModel(
    name="llava",
    build=tiny_llava.oracle_model,
    geometry=ModelGeometry(
        tiny_llava.NUM_LAYERS,
        tiny_llava.NUM_HEADS,
        4,
        32,
        256,
        supports_images=True,
        architecture="LlavaForConditionalGeneration",
    ),
    picture_token="<image>",
    embedding_id=tiny_llava.IMAGE_TOKEN,
    picture_sizes=((tiny_llava.SIZE, tiny_llava.SIZE),) * 2,
    picture_tokens=(tiny_llava.TOKENS_PER_IMAGE,) * 2,
    pixel_inputs=("pixel_values",),
    tau=tiny_llava.TAU,
)
