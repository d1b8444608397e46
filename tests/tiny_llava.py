"""A Llava-shaped checkpoint of random weights, small and with attention sinks, for engine tests.

4 layers, hidden size 256, 8 heads over 4 KV heads, 16 tokens per image; SmolLM2's tokenizer with
one of its unused special tokens as `<image>`. The embedding of <|im_start|> and the projector are
given massive values in SINK_DIMS, so that the first token and some image tokens are sinks.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from headway.server.models.smollm2 import ensure_smollm2

IMAGE_TOKEN = 16
TOKENS_PER_IMAGE = 16
SIZE, PATCH = 56, 14
SINK_DIMS = [5, 9]
TAU = 2.9
NUM_LAYERS, NUM_HEADS = 4, 8

TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}"
    "{% if m['content'] is string %}{{m['content']}}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% elif c['type'] == 'text' %}{{c['text']}}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def build(folder: Path) -> Path:
    """Write the checkpoint, the same every time, into `folder`."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[1, SINK_DIMS] = torch.tensor([12.0, -8.0])
        # Some image tokens react to the picture with a massive value, others do not.
        projector = model.model.multi_modal_projector
        for parameter in projector.parameters():
            parameter.normal_(0.0, 0.12)
        projector.linear_2.weight[SINK_DIMS] *= 6
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {vllm_name(name): weight for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    save_processor(folder)
    return folder


def vllm_name(name: str) -> str:
    """The name under which vLLM looks for a weight of the vision tower."""
    if "vision_tower." in name and "vision_model" not in name:
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    return name


def save_processor(folder: Path) -> None:
    """SmolLM2's tokenizer with `<image>`, and an image processor for small pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (Path(ensure_smollm2()) / name).read_text()
            (Path(scratch) / name).write_text(content.replace("<empty_output>", "<image>"))
        tokenizer = AutoTokenizer.from_pretrained(scratch)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, do_resize=True)
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def oracle_model(folder: Path) -> LlavaForConditionalGeneration:
    """The same weights in transformers."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        path = Path(scratch) / "model.safetensors"
        weights = load_file(path)
        back = {
            name.replace("vision_tower.vision_model.", "vision_tower."): weight
            for name, weight in weights.items()
        }
        save_file(back, path, metadata={"format": "pt"})
        return LlavaForConditionalGeneration.from_pretrained(
            scratch, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def picture(seed: int) -> Image.Image:
    """Bright shapes on dark ground."""
    draw = random.Random(seed)
    image = Image.new("RGB", (SIZE, SIZE), tuple(draw.randrange(40) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        left, top = draw.randrange(SIZE), draw.randrange(SIZE)
        box = (left, top, left + draw.randrange(6, 30), top + draw.randrange(6, 30))
        colour = tuple(draw.randrange(100, 256) for _ in range(3))
        (pen.ellipse if draw.random() < 0.5 else pen.rectangle)(box, fill=colour)
    return image
