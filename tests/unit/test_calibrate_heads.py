"""`headway calibrate heads`: the choice, what a model is asked, and the command on a tiny LLaVA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headway.benchmarks.quality.scenes import question, scene
from headway.server import cli
from headway.server.calibration import head_outputs, heads, pictures
from headway.server.commands import calibrate
from headway.steering import ModelGeometry
from headway.steering.heads import HeadProfile

pytestmark = pytest.mark.unit

LAYERS, HEADS, HEAD_SIZE, HIDDEN = 4, 8, 8, 64
IMAGE, TOKENS_PER_IMAGE, SIZE, PATCH = 3, 4, 28, 14
GEOMETRY = ModelGeometry(
    LAYERS,
    HEADS,
    2,
    HEAD_SIZE,
    HIDDEN,
    supports_images=True,
    architecture="LlavaForConditionalGeneration",
)
TEXT = "<unk> <s> </s> <image> user assistant Is there a fork car in the image ? Describe ."
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% for c in m['content'] %}"
    "{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
)
FORK, CAR = "Is there a fork in the image?", "Is there a car in the image?"


# The choice


def test_heads_above_the_median_of_their_layer_are_chosen() -> None:
    vhd = torch.tensor([[1.0, 2, 3, 4], [9, 9, 9, 8], [0, 5, 0, 0]])
    assert heads.select_heads(vhd, [2, 0]) == ((0, 2), (0, 3), (2, 1))
    assert heads.select_heads(vhd, [1]) == ()
    assert "layers 1: " in heads.explain_none(vhd, [1])


def test_the_table_names_the_strongest_first() -> None:
    vhd = torch.zeros(LAYERS, HEADS)
    vhd[1, [2, 7]] = torch.tensor([0.5, 2.0])
    vhd[3, 4] = 1.25
    profile = heads.make_profile(vhd, [3, 1], 2.0, 5, ["What?"], GEOMETRY)
    title, _, one, three, strongest = heads.table(profile).splitlines()
    assert "over 5 images, 3 heads of 2 layers" in title
    assert one.split() == ["1", "0.000", "2.000", "2", "7"]
    assert three.split() == ["3", "0.000", "1.250", "4"]
    assert strongest.endswith(": [1, 7] 2.000, [3, 4] 1.250, [1, 2] 0.500")


# Pictures


def test_pictures_of_a_folder_in_order_with_every_question(tmp_path: Path) -> None:
    for name, colour in (("b.png", "red"), ("a.JPG", "blue")):
        Image.new("RGBA" if name == "b.png" else "RGB", (4, 4), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    files = pictures.image_files(tmp_path)
    assert [path.name for path in files] == ["a.JPG", "b.png"]
    asked = list(pictures.ask_about_files(files, ["x", "y"]))
    assert [text for _, text in asked] == ["x", "y", "x", "y"]
    assert all(image.mode == "RGB" for image, _ in asked)
    assert asked[2][0].getpixel((0, 0)) == (255, 0, 0)


def test_a_folder_without_pictures_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture"):
        pictures.image_files(tmp_path)
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(OSError, match="a.png"):
        list(pictures.ask_about_files(pictures.image_files(tmp_path), ["x"]))


def test_scenes_are_asked_about_an_object_in_them() -> None:
    for index, (image, text) in enumerate(pictures.ask_about_scenes(6, ())):
        drawn = scene("test_prior", index)
        assert text in {question(name) for name in drawn.objects}
        assert image == drawn.image
    given = list(pictures.ask_about_scenes(2, ("x", "y")))
    assert [text for _, text in given] == ["x", "y", "x", "y"]


# Head outputs of a tiny LLaVA


@pytest.fixture(scope="module")
def model() -> Any:
    """A LLaVA of random weights."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=32,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS_PER_IMAGE,
    )
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    """Its processor; texts begin with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def direct_outputs(model: Any, **inputs: torch.Tensor) -> np.ndarray:
    """What enters o_proj at the last position, seen from its other end: [layers, heads, size]."""
    entered: list[np.ndarray] = []
    layers = model.model.language_model.layers
    handles = [
        layer.self_attn.o_proj.register_forward_hook(
            lambda module, args, output: entered.append(args[0][0, -1].detach().numpy())
        )
        for layer in layers
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return np.stack(entered).reshape(LAYERS, HEADS, HEAD_SIZE)


def direct_divergence(model: Any, processor: Any, image: Image.Image, text: str) -> np.ndarray:
    """VHD by the paper's formulas, head by head: [layers, heads]."""
    spelled = [WORDS.index(word) for word in text.replace("?", " ?").split()]
    user, assistant = WORDS.index("user"), WORDS.index("assistant")
    with_image = [1, user, *[IMAGE] * TOKENS_PER_IMAGE, *spelled, assistant]
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    z = direct_outputs(model, input_ids=torch.tensor([with_image]), pixel_values=pixels)
    text_only = torch.tensor([[1, user, *spelled, assistant]])
    z_text = direct_outputs(model, input_ids=text_only)
    vhd = np.sqrt(((z - z_text) ** 2).sum(axis=-1))
    activity = (z_text**2).sum(axis=-1)
    for layer in range(LAYERS):
        far, loud = (
            values[layer] > values[layer].mean() + values[layer].std(ddof=1)
            for values in (vhd.copy(), activity)
        )
        vhd[layer, far & loud] = 0
    return vhd


def test_the_mean_divergence_equals_a_direct_computation(model: Any, processor: Any) -> None:
    asked = [(picture(0), FORK), (picture(0), CAR), (picture(1), FORK), (picture(2), FORK)]
    found = head_outputs.mean_divergence(model, processor, asked, len(asked), HEADS)
    expected = np.stack([direct_divergence(model, processor, *each) for each in asked])
    assert found.shape == (LAYERS, HEADS)
    np.testing.assert_allclose(found.numpy(), expected.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert (expected[:, 1:].std(axis=0) > 1e-3).any()  # pictures and questions do matter


def test_a_text_is_run_once_without_an_image(
    model: Any, processor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [(picture(0), FORK), (picture(1), FORK), (picture(1), CAR)]
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    head_outputs.mean_divergence(model, processor, asked, len(asked), HEADS)
    handle.remove()
    long = 1 + 1 + TOKENS_PER_IMAGE + 8 + 1
    short = long - TOKENS_PER_IMAGE
    assert lengths == [short, long, long, short, long]
    assert "head outputs: 100%" in capsys.readouterr().err


def test_without_an_image_no_trace_of_it_is_left() -> None:
    inputs = {
        "input_ids": torch.tensor([[1, 4, 3, 3, 7]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 1]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 1, 0]]),
        "pixel_values": torch.zeros(1, 3, 4, 4),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }
    left = head_outputs.without_image(inputs, IMAGE)
    assert {name: value.tolist() for name, value in left.items()} == {
        "input_ids": [[1, 4, 7]],
        "attention_mask": [[1, 1, 1]],
        "token_type_ids": [[0, 0, 0]],
    }


@pytest.mark.parametrize(
    ("tokens", "words"), [([1, 4, 7], "no image token 3"), ([1, 3, 5, 3, 7], "tiles or rows")]
)
def test_images_that_are_not_one_run_of_image_tokens(tokens: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        head_outputs.without_image({"input_ids": torch.tensor([tokens])}, IMAGE)


def test_an_image_that_enters_beside_the_tokens(model: Any, processor: Any) -> None:
    def lengthen(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"input_ids": torch.cat([kwargs["input_ids"]] * 2, dim=1)}

    handle = model.register_forward_pre_hook(lengthen, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match="layer 0 sees 6 positions of 3 tokens"):
            head_outputs.head_outputs(model, {"input_ids": torch.tensor([[1, 4, 5]])}, HEADS)
    finally:
        handle.remove()


@pytest.fixture
def restored(model: Any) -> Iterator[Any]:
    """The model, whose attributes a test may take away."""
    attention = model.model.language_model.layers[2].self_attn
    projection, token = attention.o_proj, model.config.image_token_id
    yield model
    attention.o_proj, model.config.image_token_id = projection, token
    vars(model).pop("forward", None)


def test_classes_that_hide_what_is_needed(restored: Any) -> None:
    head_outputs.check_class(restored)
    restored.model.language_model.layers[2].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="layer 2 has no output projection"):
        head_outputs.check_class(restored)
    restored.config.image_token_id = None
    with pytest.raises(ValueError, match="names no image token"):
        head_outputs.check_class(restored)
    restored.forward = lambda input_ids, pixel_values: None
    with pytest.raises(ValueError, match="takes no prompt without an image"):
        head_outputs.check_class(restored)


def test_a_processor_without_a_chat_template(processor: Any) -> None:
    template, processor.chat_template = processor.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            head_outputs.prompt_inputs(processor, picture(0), FORK)
    finally:
        processor.chat_template = template


# The command


@pytest.mark.slow
def test_the_command_on_a_checkpoint(
    model: Any, processor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, images = tmp_path / "model", tmp_path / "images"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    images.mkdir()
    for seed in range(2):
        picture(seed).save(images / f"{seed}.png")
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--images", str(images), "--question", FORK, "--question", CAR, "--alpha", "1.5"]
    options += ["--layers", "0", "2-3", "--output", str(output), "--plot", str(plot)]
    assert cli.main(["calibrate", "heads", str(checkpoint), *options]) == 0
    profile = HeadProfile.load(output)
    profile.check_model(GEOMETRY)
    expected = np.mean(
        [direct_divergence(model, processor, picture(i), q) for i in (0, 1) for q in (FORK, CAR)],
        axis=0,
    )
    np.testing.assert_allclose(profile.vhd, expected, rtol=1e-4, atol=2e-6)
    assert (profile.layers, profile.alpha, profile.num_images) == ((0, 2, 3), 1.5, 2)
    assert profile.questions == (FORK, CAR)
    median = np.sort(expected, axis=1)[:, (HEADS - 1) // 2]
    chosen = [
        (layer, h)
        for layer in (0, 2, 3)
        for h in range(HEADS)
        if expected[layer, h] > median[layer]
    ]
    assert list(profile.heads) == chosen
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"profile: {output}" in capsys.readouterr().out


def test_weights_that_are_not_in_the_checkpoint(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing.*linear_1"):
        head_outputs.load_image_model(str(tmp_path))


@pytest.fixture
def loaded(model: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on the tiny model without files of it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "read_model", lambda name: name)
    monkeypatch.setattr(calibrate, "steerable_geometry", lambda config: GEOMETRY)
    monkeypatch.setattr(head_outputs, "load_image_model", lambda name: (model, processor))
    return monkeypatch


def test_scenes_and_vhrs_layers_are_the_default(loaded: Any, tmp_path: Path) -> None:
    assert cli.main(["calibrate", "heads", "m", "--scenes", "3"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["heads.json"]
    profile = json.loads((tmp_path / "heads.json").read_text())
    assert (profile["num_images"], profile["layers"]) == (3, [0, 2, 3])
    assert set(profile["questions"]) == {text for _, text in pictures.ask_about_scenes(3, ())}


def test_other_pictures_are_to_be_described(loaded: Any, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    assert cli.main(["calibrate", "heads", "m", "--images", "."]) == 0
    profile = json.loads((tmp_path / "heads.json").read_text())
    assert profile["questions"] == ["Describe the image."]


def test_a_model_whose_heads_do_not_differ(
    loaded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = torch.zeros(LAYERS, HEADS)
    loaded.setattr(head_outputs, "mean_divergence", lambda *arguments: flat)
    assert cli.main(["calibrate", "heads", "m", "--scenes", "1"]) == 1
    assert not list(tmp_path.iterdir())
    assert "no head chosen in the layers 0, 2, 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images", "/no/such/folder"], "/no/such/folder"),
        (["--images", "."], "holds no picture"),
        (["--layers", "1", "4"], "layers[1]: layer 4 does not exist"),
        (["--layers", "1-2", "2"], "layer 2 is given twice"),
        (["--output", "/no/such/folder/heads.json"], "the folder does not exist"),
    ],
)
def test_what_cannot_be_used_is_named(
    options: list[str], words: str, loaded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", "heads", "m", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_without_images(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    blind = ModelGeometry(LAYERS, HEADS, 2, HEAD_SIZE, HIDDEN)
    loaded.setattr(calibrate, "steerable_geometry", lambda config: blind)
    assert cli.main(["calibrate", "heads", "m"]) == 2
    assert "takes no images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--images", "a", "--scenes", "3"],
        ["--scenes", "0"],
        ["--layers", "5-3"],
        ["--layers", "x"],
        ["--alpha", "0"],
    ],
)
def test_bad_options_are_errors(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", "heads", "m", *options])
    assert ended.value.code == 2
    assert "usage: headway calibrate heads" in capsys.readouterr().err
