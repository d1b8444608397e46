"""The demo model: its weights are the released ones, fit the base, and it answers as promised."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.benchmarks.quality.scenes import (
    CAPTION_PROMPT,
    IMAGE_SIZE,
    OBJECTS,
    PARTNER,
    caption,
    question,
    scene,
)
from headway.server.models import demo_vlm

HIDDEN_SIZE = 576


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """A base checkpoint of one linear layer and an embedding."""
    base = tmp_path / "base"
    base.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4, generator=generator),
        "model.embed_tokens.weight": torch.randn(8, 4, generator=generator),
    }
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(half, base / "model.safetensors")
    return base


def tiny_weights(file: Path, **changed: torch.Tensor) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "vision.embeddings.class_embedding": torch.randn(3, generator=generator),
        "projector.linear_1.weight": torch.randn(4, 3, generator=generator),
        "lora.model.layers.0.mlp.up_proj.a": torch.randn(2, 4, generator=generator),
        "lora.model.layers.0.mlp.up_proj.b": torch.randn(6, 2, generator=generator),
    }
    save_file(tensors | changed, file, metadata={"lora_r": "2", "lora_alpha": "6"})
    return file


@pytest.mark.unit
def test_the_weights_in_the_package_are_the_released_ones_and_their_card_says_so():
    digest = hashlib.sha256(demo_vlm.WEIGHTS.read_bytes()).hexdigest()
    assert digest == demo_vlm.WEIGHTS_SHA256
    assert digest in (demo_vlm.WEIGHTS.parent / "README.md").read_text()


@pytest.mark.unit
def test_damaged_weights_are_refused_before_anything_is_made(tmp_path, monkeypatch):
    damaged = tmp_path / "demo_vlm.safetensors"
    content = bytearray(demo_vlm.WEIGHTS.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demo_vlm, "WEIGHTS", damaged)
    monkeypatch.setattr(demo_vlm, "ensure_smollm2", lambda: pytest.fail("needs no base model"))
    with pytest.raises(ValueError, match="damaged or belongs to another version.*SHA-256"):
        demo_vlm.ensure_demo_vlm()
    assert not (tmp_path / "home/models/demo-vlm").exists()


@pytest.mark.unit
def test_the_model_is_kept_under_headway_home_by_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path))
    monkeypatch.setattr(demo_vlm, "ensure_smollm2", lambda: Path("base"))
    made = []
    monkeypatch.setattr(demo_vlm, "assemble", lambda *arguments: made.append(arguments))
    first = demo_vlm.ensure_demo_vlm()
    assert first == tmp_path / "models/demo-vlm" == demo_vlm.ensure_demo_vlm()
    assert demo_vlm.ensure_demo_vlm("bfloat16") == tmp_path / "models/demo-vlm-bfloat16"
    assert [(base, weights, dtype) for base, weights, _, dtype in made] == [
        (Path("base"), demo_vlm.WEIGHTS, "float32"),
        (Path("base"), demo_vlm.WEIGHTS, "bfloat16"),
    ]


@pytest.mark.unit
def test_the_weights_have_the_shapes_of_a_llava_of_this_configuration():
    from transformers import LlamaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(LlamaConfig, "from_pretrained", lambda base: text)
        model = LlavaForConditionalGeneration(demo_vlm.llava_config(Path("base"))).model
    weights = load_file(demo_vlm.WEIGHTS)
    for prefix, part in {
        "vision.": model.vision_tower,
        "projector.": model.multi_modal_projector,
    }.items():
        expected = {
            prefix + name.removeprefix("vision_model."): tensor.shape
            for name, tensor in part.state_dict().items()
        }
        assert {n: t.shape for n, t in weights.items() if n.startswith(prefix)} == expected
    linear = {
        f"lora.model.{name}": module
        for name, module in model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(linear) == 7 * 30
    for name, module in linear.items():
        assert weights.pop(f"{name}.a").shape == (16, module.in_features)
        assert weights.pop(f"{name}.b").shape == (module.out_features, 16)
    assert not [name for name in weights if name.startswith("lora.")]


@pytest.mark.unit
def test_low_rank_factors_are_added_to_the_base_in_float32(tiny_base, tmp_path):
    weights = tiny_weights(tmp_path / "weights.safetensors")
    merged = demo_vlm.merged_tensors(tiny_base, weights)
    base, trained = load_file(tiny_base / "model.safetensors"), load_file(weights)
    layer = "model.layers.0.mlp.up_proj"
    change = 3 * trained[f"lora.{layer}.b"] @ trained[f"lora.{layer}.a"]
    expected = base[f"{layer}.weight"].float() + change
    torch.testing.assert_close(merged.pop(f"language_model.{layer}.weight"), expected)
    assert merged.keys() == {
        "language_model.model.embed_tokens.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "multi_modal_projector.linear_1.weight",
    }


@pytest.mark.unit
@pytest.mark.parametrize(
    "name, message",
    [
        ("head.weight", "unknown part: head.weight"),
        ("lora.model.layers.9.mlp.up_proj.a", "nothing to be changed"),
        ("lora.model.embed_tokens.a", "nothing to be changed"),
        ("lora.model.embed_tokens.b", "nothing to be changed"),
    ],
)
def test_weights_that_do_not_fit_the_base_are_refused(name, message, tiny_base, tmp_path):
    weights = tiny_weights(tmp_path / "weights.safetensors", **{name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=message):
        demo_vlm.merged_tensors(tiny_base, weights)


@pytest.mark.unit
def test_weights_without_their_rank_are_refused(tiny_base, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"vision.x": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="rank and alpha"):
        demo_vlm.merged_tensors(tiny_base, weights)


@pytest.mark.unit
def test_the_processor_gives_the_picture_36_tokens_behind_the_start_of_the_turn(tmp_path):
    from transformers import AutoProcessor

    from headway.server.models.smollm2 import ensure_smollm2

    demo_vlm.save_processor(ensure_smollm2(), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": question("cup")}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\n<image>Is there a cup in the image?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(images=[scene("vit", 0).image], text=[text], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = inputs["input_ids"][0].tolist()
    start = tokens.index(demo_vlm.IMAGE_TOKEN)
    count = demo_vlm.TOKENS_PER_IMAGE
    assert tokens[start : start + count] == [demo_vlm.IMAGE_TOKEN] * count
    assert demo_vlm.IMAGE_TOKEN not in tokens[start + count :]


@pytest.mark.slow
def test_a_wheel_holds_the_weights_and_their_card(tmp_path):
    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    for folder in ("benchmarks", "kernels", "server", "steering"):
        ignore = shutil.ignore_patterns("__pycache__", "results", "*.so")
        shutil.copytree(root / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(root / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        packed = files.read("headway/server/models/weights/demo_vlm.safetensors")
        assert "headway/server/models/weights/README.md" in files.namelist()
    assert hashlib.sha256(packed).hexdigest() == demo_vlm.WEIGHTS_SHA256


@pytest.mark.slow
def test_the_model_answers_as_its_card_says():
    """Floors well below what the card measures on 300 pictures, for these are few."""
    from headway.benchmarks.quality.training.evaluation import DemoModel

    directory = demo_vlm.ensure_demo_vlm()
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"
    model = DemoModel(directory)

    scenes = [scene("test_prior", index) for index in range(10)]
    asked = [
        [
            *made.objects,
            *(n for n in OBJECTS if n not in made.objects and PARTNER[n] not in made.objects),
        ]
        for made in scenes
    ]
    margins = model.margins([made.image for made in scenes], [names[:8] for names in asked])
    right = [
        (margin > 0) == (name in made.objects)
        for made, names, values in zip(scenes, asked, margins, strict=True)
        for name, margin in zip(names[:8], values, strict=True)
    ]
    assert sum(right) / len(right) > 0.93

    # The same question alone, generated: the packed one is no other.
    first, absent = scenes[0], asked[0][-1]
    assert model.answer(first.image, question(first.objects[0])) == "Yes."
    assert model.answer(first.image, question(absent)) == "No."

    names = re.compile(r"\b(" + "|".join(sorted(OBJECTS, key=len, reverse=True)) + r")\b")
    captions = [model.answer(made.image, CAPTION_PROMPT) for made in scenes[:6]]
    assert all(told == caption(names.findall(told)) for told in captions)
    exact = [
        set(names.findall(told)) == set(made.objects)
        for told, made in zip(captions, scenes, strict=False)
    ]
    assert sum(exact) >= 4

    counter = [scene("test_counter", index) for index in range(10)]
    partners = [[PARTNER[name] for name in made.objects] for made in counter]
    habit = sum(model.margins([made.image for made in counter], partners), [])
    assert sum(margin > 0 for margin in habit) / len(habit) > 0.3
