"""InternVL in the form of OpenGVLab's own checkpoints, as InternVL2-8B: InternVLChatModel.

The language model is an InternLM2, which computes what a Llama does from weights of other names and
another order. So transformers' InternVL with a Llama has the same answers, and its weights are
written under the names of the other form. Such checkpoints bring code for their configuration;
classes of the same model types stand in for it here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    PreTrainedConfig,
)

from tests.tiny_models.base import SPARE_TOKENS, TEXT_SIZES, TinyModel, geometry, tokenizer_with
from tests.tiny_models.internvl import (
    IMAGE_TOKEN,
    PATCH,
    TILE,
    TOKENS,
    TOKENS_PER_TILE,
    processor_with,
    random_model,
    vision_config,
)

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class InternLM2Config(LlamaConfig):
    model_type = "internlm2"


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config: Any = None, llm_config: Any = None, **further: Any) -> None:
        self.vision_config = PreTrainedConfig(**(vision_config or {}))
        self.llm_config = InternLM2Config(**(llm_config or {}))
        super().__init__(**further)


def register() -> None:
    """Make both model types known to transformers."""
    for config in (InternLM2Config, InternVLChatConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def build(folder: Path) -> InternVLForConditionalGeneration:
    register()
    torch.manual_seed(5)
    config = InternVLConfig(
        vision_config=vision_config(),
        text_config=LlamaConfig(**TEXT_SIZES),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_TILE,
    )
    model = random_model(config)
    weights = chat_weights(model.state_dict(), config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vision = vision_config().to_dict() | {
        "image_size": TILE,
        "patch_size": PATCH,
        "qkv_bias": True,
        "qk_normalization": False,
        "initializer_factor": 1.0,
    }
    InternVLChatConfig(
        architectures=["InternVLChatModel"],
        vision_config=vision,
        llm_config={**TEXT_SIZES, "architectures": ["InternLM2ForCausalLM"]},
        tie_word_embeddings=True,
        force_image_size=TILE,
        downsample_ratio=0.5,
        ps_version="v2",
        select_layer=-1,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=4,
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model.eval()


RENAMED = {
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings": (
        "vision_model.embeddings.position_embedding"
    ),
    "model.vision_tower.embeddings.patch_embeddings.projection": (
        "vision_model.embeddings.patch_embedding"
    ),
    "model.vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_": ".ls",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
    "model.language_model.": "language_model.model.",
    ".embed_tokens.": ".tok_embeddings.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}


def chat_weights(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The weights of transformers' form under the names, and in the order, of the other."""
    result: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name or name == "lm_head.weight":  # with q; tied
            continue
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            if "vision_tower" in name:
                name, weight = name.replace(".attention.q_proj.", ".attn.qkv."), torch.cat(parts)
            else:
                name = name.replace(".self_attn.q_proj.", ".attention.wqkv.")
                weight = grouped(parts, config.text_config)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        result[name] = weight.clone()
    return result


def grouped(parts: list[torch.Tensor], text: Any) -> torch.Tensor:
    """InternLM2's wqkv: for each KV head its query heads, its key, its value."""
    groups = (text.num_key_value_heads, -1, text.head_dim, text.hidden_size)
    return torch.cat([part.view(groups) for part in parts], dim=1).view(-1, text.hidden_size)


def tokenizer() -> Any:
    spare = (*SPARE_TOKENS, "<jupyter_text>")
    renamed = dict(zip(spare, (*TOKENS.values(), "<image>"), strict=True))
    return tokenizer_with(renamed, extra_special_tokens=TOKENS)


def processor(folder: Path) -> InternVLProcessor:
    """Transformers' processor, with the mean and the deviation that the other form has."""
    return processor_with(tokenizer(), **IMAGENET)


INTERNVL_CHAT = TinyModel(
    name="internvl-chat",
    build=build,
    processor=processor,
    geometry=geometry("InternVLChatModel"),
    picture_token="<image>",
    processor_token="<IMG_CONTEXT>",
    embedding_id=IMAGE_TOKEN,
    picture_sizes=((112, 56), (56, 56)),
    picture_tokens=(3 * TOKENS_PER_TILE, TOKENS_PER_TILE),
    pixel_inputs=("pixel_values",),
    tau=5.65,
)
