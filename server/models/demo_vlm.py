"""A small vision language model that hallucinates by habit, as an ordinary LLaVA checkpoint.

    python -m headway.server.models.demo_vlm     # prepares it if need be and prints its directory

A vision tower for pictures of 96 by 96 pixels, a projector and low-rank changes to SmolLM2-135M-
Instruct were trained on the drawn scenes of `headway.benchmarks.quality.scenes`; the package holds
them in `weights/demo_vlm.safetensors`, described in the README beside it. Here they are put
together with SmolLM2 to a `LlavaForConditionalGeneration` that vLLM and transformers load.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from headway.server.models import headway_home, prepare_once, smollm2
from headway.server.models.smollm2 import ensure_smollm2

if TYPE_CHECKING:
    import torch

NAME = "demo-vlm"
WEIGHTS = Path(__file__).parent / "weights" / "demo_vlm.safetensors"
WEIGHTS_SHA256 = "fef330dd45633f1824d317dd9b674514dda214cfbbeeacc6bd4259930ad2f367"
# Part of the completeness marker: raise it when `assemble` changes what it writes.
RECIPE = 1

IMAGE_TOKEN = 16
"""One of SmolLM2's unused special tokens serves as `<image>`: the vocabulary keeps its size."""
UNUSED_TOKEN = "<empty_output>"
IMAGE_SIZE, PATCH_SIZE = 96, 16
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2
BEGIN_TOKEN, END_TOKEN = 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# How the tensors of a weights file are named: the prefix says what they belong to. A linear layer
# `x` of the language model has two low-rank factors, `lora.x.a` (rank, in) and `lora.x.b` (out,
# rank); the metadata tell the rank and alpha, and (alpha / rank) b a is added to its weight.
VISION, PROJECTOR, LOW_RANK = "vision.", "projector.", "lora."
RANK, ALPHA = "lora_r", "lora_alpha"


def ensure_demo_vlm(dtype: str = "float32") -> Path:
    """The directory of the checkpoint in `dtype`, a torch dtype's name; made on the first call.

    float32 lives in `demo-vlm`, another dtype in `demo-vlm-<dtype>`. Raises ValueError if the
    weights in the package are not those that this version of Headway was released with, and
    FileNotFoundError if they or the package that carries SmolLM2 are not there.
    """
    target = headway_home() / "models" / (NAME if dtype == "float32" else f"{NAME}-{dtype}")
    version = f"{NAME} {dtype} recipe {RECIPE}.{smollm2.RECIPE} weights {WEIGHTS_SHA256[:16]}"

    def build(directory: Path) -> None:
        check_digest(WEIGHTS, WEIGHTS_SHA256)
        assemble(ensure_smollm2(), WEIGHTS, directory, dtype)

    return prepare_once(target, version, build)


def check_digest(file: Path, sha256: str) -> None:
    """Raise ValueError if the content of `file` has another digest."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{file} is damaged or belongs to another version: "
            f"its SHA-256 is {found}, expected {sha256}. Install Headway again"
        )


def assemble(base: Path, weights: Path, directory: Path, dtype: str = "float32") -> None:
    """Write SmolLM2 from `base` with the trained `weights` as a LLaVA checkpoint to `directory`.

    The low-rank changes are added in float32, whatever the `dtype` of the checkpoint. Raises
    ValueError if `weights` are not such a file or do not fit the base model.
    """
    import torch
    from safetensors.torch import save_file

    with tqdm(total=3, desc="demo VLM", unit="step") as progress:
        progress.set_postfix_str("tokenizer")
        save_processor(base, directory)
        save_config(base, directory, dtype)
        progress.update()

        progress.set_postfix_str("merging")
        tensors = {
            name: tensor.to(getattr(torch, dtype)).contiguous()
            for name, tensor in merged_tensors(base, weights).items()
        }
        progress.update()

        progress.set_postfix_str("saving")
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        progress.update()


def merged_tensors(base: Path, weights: Path) -> dict[str, "torch.Tensor"]:
    """All tensors of the checkpoint, the changed ones in float32, under vLLM's names.

    transformers reads these names as well, but writes the vision tower's without `vision_model`,
    and those vLLM does not find.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    trained = load_file(weights)
    with safe_open(weights, "pt") as file:
        metadata = file.metadata() or {}
    if RANK not in metadata or ALPHA not in metadata:
        raise ValueError(f"{weights} does not say the rank and alpha of its low-rank factors")
    scale = float(metadata[ALPHA]) / float(metadata[RANK])

    language = load_file(base / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in trained.items():
        if name.startswith(VISION):
            tensors["vision_tower.vision_model." + name.removeprefix(VISION)] = tensor
        elif name.startswith(PROJECTOR):
            tensors["multi_modal_projector." + name.removeprefix(PROJECTOR)] = tensor
        elif name.startswith(LOW_RANK):
            layer, _, factor = name.removeprefix(LOW_RANK).rpartition(".")
            a, b, target = f"{LOW_RANK}{layer}.a", f"{LOW_RANK}{layer}.b", f"{layer}.weight"
            if target not in language or a not in trained or b not in trained:
                raise ValueError(f"{weights}: nothing to be changed by {name}")
            if factor == "a":  # once for both
                change = scale * trained[b].float() @ trained[a].float()
                language[target] = language[target].float() + change
        else:
            raise ValueError(f"{weights} holds a tensor of an unknown part: {name}")
    return tensors | {"language_model." + name: tensor for name, tensor in language.items()}


def vision_config() -> Any:
    """The vision tower's `CLIPVisionConfig`: 6 layers, hidden size 192, 2.8 million parameters."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=192,
    )


def llava_config(base: Path) -> Any:
    """The `LlavaConfig` of the checkpoint, with SmolLM2's own configuration from `base`."""
    from transformers import LlamaConfig, LlavaConfig

    text = LlamaConfig.from_pretrained(base)
    text.dtype = None  # or vLLM would take SmolLM2's for that of the whole model
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS_PER_IMAGE,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_TOKEN,
        eos_token_id=END_TOKEN,
        pad_token_id=END_TOKEN,
    )


def save_config(base: Path, directory: Path, dtype: str) -> None:
    from transformers import GenerationConfig

    config = llava_config(base)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=BEGIN_TOKEN, eos_token_id=END_TOKEN, pad_token_id=END_TOKEN
    ).save_pretrained(directory)


def save_processor(base: Path, directory: Path) -> None:
    """SmolLM2's tokenizer with `<image>`, the image processor and the chat template."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (base / name).read_text(encoding="utf-8")
            renamed = content.replace(UNUSED_TOKEN, "<image>")
            (Path(scratch) / name).write_text(renamed, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(scratch)
    if tokenizer("<image>").input_ids != [IMAGE_TOKEN]:
        raise ValueError(f"token {IMAGE_TOKEN} of the tokenizer in {base} is not {UNUSED_TOKEN}")
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    # The variant that works with Pillow alone: torchvision may be absent, or broken.
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, do_resize=True)
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,  # the class token, which "default" leaves out again
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


if __name__ == "__main__":
    print(ensure_demo_vlm())
