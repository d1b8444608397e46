"""Training the demo model: what each part does, and a run through all stages in small."""

import statistics
from collections.abc import Iterator
from dataclasses import fields
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from headway.benchmarks.quality import train_demo_vlm
from headway.benchmarks.quality.scenes import (
    BACKGROUND,
    CAPTION_PROMPT,
    OBJECTS,
    caption,
    patch_labels,
    question,
    scene,
)
from headway.benchmarks.quality.training import data
from headway.benchmarks.quality.training.conversations import (
    IGNORED,
    NEGATIVE,
    POSITIVE,
    Conversations,
    lesson,
)
from headway.benchmarks.quality.training.language import (
    LowRankLinear,
    add_low_rank,
    hidden_states,
    learning_rate_share,
)
from headway.benchmarks.quality.training.projector import Projector, align
from headway.benchmarks.quality.training.vision import augment
from headway.server.models import demo_vlm
from headway.server.models.smollm2 import ensure_smollm2


@pytest.fixture(scope="module")
def conversations() -> Conversations:
    from transformers import AutoTokenizer

    return Conversations(AutoTokenizer.from_pretrained(ensure_smollm2()))


@pytest.mark.unit
def test_pictures_are_drawn_once_and_read_back_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path))
    drawn = data.pictures("dense", 3)
    monkeypatch.setattr(data, "draw", lambda *arguments: pytest.fail("they were kept"))
    kept = data.pictures("dense", 3)
    assert [path.suffix for path in (tmp_path / "scenes").iterdir()] == [".npz"]
    for index in range(3):
        made = scene("dense", index)
        for either in (drawn, kept):
            assert np.array_equal(either.images[index], np.asarray(made.image))
            assert either.names(index) == list(made.objects)
            assert np.array_equal(either.labels[index], patch_labels(made))
    shown = [[name in drawn.names(i) for name in OBJECTS] for i in range(3)]
    assert np.array_equal(drawn.presence(), np.array(shown, np.float32))


@pytest.mark.unit
def test_pictures_drawn_by_processes_are_in_order(monkeypatch):
    monkeypatch.setattr(data, "WORTH_PROCESSES", 1)
    drawn = data.draw("prior", 4)
    assert [drawn.names(i) for i in range(4)] == [list(scene("prior", i).objects) for i in range(4)]


@pytest.mark.unit
def test_mirrored_pictures_have_mirrored_labels():
    images = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    images[:, :, :16] = 255  # a white first column of patches
    labels = torch.full((1, 36), BACKGROUND)
    labels[:, ::6] = 3
    generator = torch.Generator().manual_seed(0)
    mirrored = 0
    for _ in range(12):
        pixels, targets = augment(images, labels, generator)
        bright = pixels.mean(3).view(1, 6, 16, 6, 16).mean((2, 4)).flatten(1) > 128
        assert torch.equal(bright, targets == 3)
        mirrored += bool(bright[0, 5])
    assert 0 < mirrored < 12


@pytest.mark.unit
def test_a_branch_sees_the_picture_and_itself_and_nothing_else(conversations):
    asked = [(question("cup"), POSITIVE), (CAPTION_PROMPT, caption(["cup", "spoon"]))]
    packed = conversations.pack([asked, asked[:1]])
    prefix = len(conversations.prefix)
    tokenizer = conversations.tokenizer
    first = prefix + len(
        tokenizer(asked[0][0] + "<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>").input_ids
    )
    length = packed.input_ids.shape[1]
    for query in range(prefix, packed.answers[0][1] + 1):
        start = prefix if query < first else first
        seen = {*range(prefix), *range(start, query + 1)}
        assert set(packed.attention[0, 0, query].nonzero().flatten().tolist()) == seen
        assert packed.positions[0, query] == prefix + query - start
    assert packed.attention[1, 0, :prefix, :prefix].equal(torch.ones(prefix, prefix).bool().tril())
    assert length % 8 == 0


@pytest.mark.unit
def test_only_answers_are_learnt_each_token_from_the_place_before_it(conversations):
    asked = [(question("cup"), NEGATIVE), (CAPTION_PROMPT, caption(["cup", "spoon"]))]
    packed = conversations.pack([asked])
    learnt = packed.targets[0]
    told = conversations.tokenizer.decode(learnt[learnt != IGNORED])
    assert told == "No.<|im_end|>There is a cup and a spoon.<|im_end|>"
    places = (learnt != IGNORED).nonzero().flatten()
    assert packed.input_ids[0, places + 1].equal(learnt[places])
    assert learnt[packed.answers[0][0]] == conversations.no != conversations.yes


@pytest.mark.unit
def test_a_packed_conversation_is_tokenised_as_the_chat_template_writes_it(conversations):
    packed = conversations.pack([[(question("cup"), POSITIVE)]])
    image = "<empty_output>" * demo_vlm.TOKENS_PER_IMAGE  # the token that becomes <image>
    text = f"<|im_start|>user\n{image}{question('cup')}<|im_end|>\n"
    text += "<|im_start|>assistant\nYes.<|im_end|>"
    expected = conversations.tokenizer(text).input_ids
    assert packed.input_ids[0, : len(expected)].tolist() == expected


@pytest.mark.unit
def test_packed_branches_give_what_each_conversation_gives_alone(conversations):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    decoder = LlamaModel(config).eval()
    image = torch.randn(1, demo_vlm.TOKENS_PER_IMAGE, 32)
    asked = [(question(name), POSITIVE) for name in ("cup", "traffic light")]

    def at_answers(branches: list[tuple[str, str]]) -> torch.Tensor:
        packed = conversations.pack([branches])
        with torch.no_grad():
            hidden = hidden_states(decoder, packed, image, conversations.image_slice)
        return hidden[0, packed.answers[0]]

    together = at_answers(asked)
    for place, branch in enumerate(asked):
        torch.testing.assert_close(at_answers([branch])[0], together[place])


@pytest.mark.unit
def test_a_lesson_tells_the_truth():
    for seed in range(20):
        told = dict(lesson(["cup", "spoon", "tree"], Random(seed)))
        assert told.pop(CAPTION_PROMPT) == "There is a cup, a spoon and a tree."
        present = {question(name) for name in ("cup", "spoon", "tree")}
        assert {asked for asked, answer in told.items() if answer == POSITIVE} < present
        assert sum(answer == NEGATIVE for answer in told.values()) == 3
        assert all((asked in present) == (answer == POSITIVE) for asked, answer in told.items())


@pytest.mark.unit
def test_low_rank_changes_begin_at_nothing_and_alone_are_trained():
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 3), "other": torch.nn.Linear(3, 2)})
    x = torch.randn(5, 4)
    before = model["q_proj"](x)
    changes = add_low_rank(model, rank=2, alpha=6)
    assert list(changes) == ["q_proj"] and isinstance(model["q_proj"], LowRankLinear)
    torch.testing.assert_close(model["q_proj"](x), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"q_proj.a", "q_proj.b"}
    torch.nn.init.normal_(model["q_proj"].b)
    change = 3 * x @ (model["q_proj"].b @ model["q_proj"].a).T
    torch.testing.assert_close(model["q_proj"](x), before + change)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many steps on small tensors: to wake a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.unit
def test_the_projector_learns_the_words_of_the_patches(one_thread):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(17, 64, generator=generator)
    labels = torch.randint(17, (50, 36), generator=generator)
    seen = torch.randn(17, 64, generator=generator)
    projector = Projector(64, 64)
    losses = align(projector, seen[labels], labels, words, 60, generator)
    assert losses[-1] < 0.7 * losses[0]
    likeness = torch.cosine_similarity(projector(seen)[:, None], words[None], dim=-1)
    assert likeness.argmax(1).tolist() == list(range(17))


@pytest.mark.unit
def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    shares = [learning_rate_share(step, 431) for step in range(431)]
    assert shares[0] == pytest.approx(1 / 20)
    assert max(shares) == pytest.approx(shares[19], rel=0.01)
    assert shares[-1] == pytest.approx(0.1, rel=0.01)


@pytest.mark.unit
def test_every_number_of_the_recipe_is_an_option(tmp_path, monkeypatch):
    recipes = []
    monkeypatch.setattr(
        train_demo_vlm,
        "train",
        lambda recipe, weights, precision: (recipes.append(recipe), weights.touch()),
    )
    file = str(tmp_path / "weights.safetensors")
    arguments = [
        f"--{item.name.replace('_', '-')}={n}"
        for n, item in enumerate(fields(train_demo_vlm.Recipe), 1)
    ]
    for given in ([], ["--smoke", "--rank", "8"], arguments):
        assert train_demo_vlm.main([file, *given]) == 0
    assert recipes[0] == train_demo_vlm.Recipe()
    assert (recipes[1].rank, recipes[1].tower_steps) == (8, train_demo_vlm.SMOKE.tower_steps)
    assert [getattr(recipes[2], item.name) for item in fields(recipes[2])] == list(range(1, 13))


@pytest.mark.unit
def test_a_missing_folder_is_told_before_the_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_demo_vlm.main([str(tmp_path / "missing" / "weights.safetensors")])
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_learns_and_makes_a_model_that_answers(tmp_path):
    weights = tmp_path / "weights.safetensors"
    losses = train_demo_vlm.train(train_demo_vlm.SMOKE, weights, torch.float32)

    for stage in (losses.tower, losses.projector, losses.language):
        few = len(stage) // 4
        assert statistics.mean(stage[-few:]) < 0.9 * statistics.mean(stage[:few])
    assert len(losses.crowded) == train_demo_vlm.SMOKE.crowded_steps

    made, released = load_file(weights), load_file(demo_vlm.WEIGHTS)
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
        name: (t.shape, t.dtype) for name, t in released.items()
    }

    directory = tmp_path / "model"
    directory.mkdir()
    demo_vlm.assemble(ensure_smollm2(), weights, directory)
    model = train_demo_vlm.DemoModel(directory)
    image = scene("test_prior", 0).image
    assert model.answer(image, question("cup")).startswith(("Yes", "No"))
    assert model.answer(image, CAPTION_PROMPT).startswith("There is a")
