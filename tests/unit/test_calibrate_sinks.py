"""`headway calibrate sinks`: the rule on made-up streams, and a model with planted sinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.server import cli
from headway.server.calibration import residual, sinks
from headway.server.calibration.prompts import PROMPTS, read_prompts
from headway.server.commands import calibrate, calibrate_options
from headway.steering import ModelGeometry
from headway.steering.sinks import SinkProfile

pytestmark = pytest.mark.unit

HIDDEN, LAYERS, PLANTED = 64, 4, (5, 40)
GEOMETRY = ModelGeometry(LAYERS, 4, 2, 16, HIDDEN, architecture="LlamaForCausalLM")
WORDS = ("red", "green", "blue", "one", "two", "three")


# The rule


def streams(*massive: dict[int, float], tokens: int = 6) -> list[torch.Tensor]:
    """|x| / RMS of noise, a prompt per argument, its first token's dimensions set as given."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for planted in massive:
        x = torch.randn(LAYERS, tokens, HIDDEN, generator=generator)
        for dim, value in planted.items():
            x[:, 0, dim] = value
        found.append(x.abs() / x.square().mean(dim=-1, keepdim=True).sqrt())
    return found


def selected(*massive: dict[int, float], max_dims: int = 8) -> tuple[int, ...]:
    return sinks.select_dims(sinks.first_token_levels(streams(*massive)), max_dims)


@pytest.mark.parametrize(("num_layers", "expected"), [(4, range(1, 3)), (30, range(7, 23))])
def test_the_middle_layers(num_layers: int, expected: range) -> None:
    assert sinks.middle_layers(num_layers) == expected


def test_dimensions_far_above_the_median_are_found_in_order() -> None:
    assert selected({40: -900.0, 5: 700.0}) == (5, 40)
    assert selected({40: -900.0, 5: 700.0}, max_dims=1) == (40,)
    assert selected({}) == ()


def test_a_large_share_is_not_enough_nor_is_a_high_multiple() -> None:
    assert selected({5: 30.0}) == ()  # most of the energy, but tens of times the median
    assert selected({5: 1e6, 6: 1e4}) == (5,)  # thousands of times, but no share beside 5


def test_three_prompts_of_four_must_agree() -> None:
    planted: dict[int, float] = {5: 900.0}
    assert selected(planted, planted, planted, {}) == (5,)
    assert selected(planted, planted, {}, {}) == ()


def test_why_there_is_none() -> None:
    message = sinks.explain_none(sinks.first_token_levels(streams({7: 30.0})))
    assert "the strongest, 7," in message
    assert "100 times" in message


def test_the_measurements() -> None:
    magnitudes = streams({5: 900.0}, {5: 900.0}, tokens=3)
    magnitudes[1][2, 1, 5] = 7.9  # one more sink, at one layer
    profile = sinks.make_profile(magnitudes, (5,), 7.0, GEOMETRY)
    [measured] = profile.measurements
    assert (profile.num_prompts, profile.num_tokens) == (2, 6)
    assert measured.sink_tokens == profile.sink_tokens == 3
    assert measured.phi_first == pytest.approx([8.0] * LAYERS, abs=0.01)
    assert max(measured.phi_other) < 3
    lines = sinks.table(profile).splitlines()
    assert lines[-1].split() == ["5", "8.00", lines[-1].split()[2], "0", "..", "3", "3"]


def test_the_table_says_when_tau_is_out_of_reach() -> None:
    shown = sinks.table(sinks.make_profile(streams({5: 900.0, 6: 800.0}), (5, 6), 20.0, GEOMETRY))
    assert "none" in shown
    assert "any" in shown
    assert "no token of this model can exceed 8.00" in shown


def test_prompts_of_one_token_give_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="more than one token"):
        sinks.make_profile(streams({5: 900.0}, tokens=1), (5,), 20.0, GEOMETRY)


def test_ranges_of_layers() -> None:
    assert sinks._ranges([2, 3, 4, 7, 9, 10]) == "2 .. 4, 7, 9 .. 10"
    assert sinks._ranges([]) == "none"


# Prompts


def test_prompts_come_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two words \n")
    assert read_prompts(path) == ("one", "two words")
    path.write_text("one\u2028two\x0cthree\x85\nfour", encoding="utf-8")
    assert read_prompts(path) == ("one\u2028two\x0cthree", "four")
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts(path)
    assert len(set(PROMPTS)) == len(PROMPTS) >= 12


class Tokenizer:
    """Takes characters for tokens."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"<{messages[0]['content']}>"


def test_a_chat_template_writes_the_special_tokens() -> None:
    assert residual.tokenize(Tokenizer(None), ["a"]) == [[1, ord("a")]]
    assert residual.tokenize(Tokenizer("t"), ["a"]) == [[ord("<"), ord("a"), ord(">")]]


# The command, on a tiny model


@pytest.fixture(scope="module")
def plain() -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def planted(plain: Any) -> Any:
    """The same with massive activations in two dimensions of token 1, with which texts begin."""
    embedding = plain.get_input_embeddings().weight
    before = embedding.detach().clone()
    with torch.no_grad():
        embedding[1, list(PLANTED)] = torch.tensor([60.0, -50.0])
    yield plain
    with torch.no_grad():
        embedding.copy_(before)


def save(model: Any, folder: Path) -> str:
    """A checkpoint with a tokenizer whose texts begin with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def test_streams_are_those_that_transformers_reports(planted: Any) -> None:
    tokens = [1, 2, 3, 4]
    [found] = residual.relative_magnitudes(planted, [tokens])
    with torch.inference_mode():
        output = planted(torch.tensor([tokens]), output_hidden_states=True)
    for layer in range(LAYERS):
        x = output.hidden_states[layer][0]
        expected = x.abs() / x.square().mean(dim=-1, keepdim=True).sqrt()
        torch.testing.assert_close(found[layer], expected)


def test_decoder_layers_that_cannot_be_told(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.config, "num_hidden_layers", LAYERS + 1)
    with pytest.raises(ValueError, match="5 decoder layers"):
        residual.decoder_layers(plain)


@pytest.mark.slow
def test_planted_dimensions_are_found_and_written(
    planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(planted, tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red green\none two three\nblue\n")
    output, plot = tmp_path / "sinks.json", tmp_path / "sinks.png"
    options = ["--prompts", str(prompts), "--output", str(output), "--plot", str(plot)]
    assert cli.main(["calibrate", "sinks", model, *options, "--tau", "4"]) == 0
    shown = capsys.readouterr()
    assert "residual streams" in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[2:4]] == ["5", "40"]
    profile = SinkProfile.load(output)
    profile.check_model(GEOMETRY)
    assert (profile.dims, profile.tau, profile.num_prompts) == (PLANTED, 4.0, 3)
    assert (profile.num_tokens, profile.sink_tokens) == (9, 3)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def loaded(plain: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on the tiny model without files of it."""
    monkeypatch.setattr(calibrate, "read_model", lambda name: name)
    monkeypatch.setattr(calibrate, "steerable_geometry", lambda config: GEOMETRY)
    monkeypatch.setattr(residual, "load_model", lambda name: (plain, None))
    monkeypatch.setattr(residual, "tokenize", lambda tokenizer, prompts: [[1, 2, 3]] * len(prompts))
    return plain


def test_built_in_prompts_and_no_plot(
    loaded: Any, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", "sinks", "m", "--max-dims", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sinks.json"]
    profile = json.loads((tmp_path / "sinks.json").read_text())
    assert profile["dims"] == [PLANTED[0]]
    assert profile["num_prompts"] == len(PROMPTS)


def test_a_model_without_sink_dimensions(
    loaded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sinks.json"
    assert cli.main(["calibrate", "sinks", "m", "--output", str(output)]) == 1
    assert not output.exists()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no sink dimension found" in shown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompts", "/no/such/file"], "/no/such/file"),
        (["--output", "/no/such/folder/sinks.json"], "the folder does not exist"),
        (["--plot", "/no/such/folder/sinks.png"], "the folder does not exist"),
    ],
)
def test_files_that_cannot_be_used_are_named_at_once(
    options: list[str], words: str, loaded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", "sinks", "m", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_plot_needs_matplotlib(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate_options, "find_spec", lambda name: None)
    assert cli.main(["calibrate", "sinks", "m", "--plot", "sinks.png"]) == 2
    assert "headway[calibrate]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [[], ["moods", "m"], ["sinks"], ["sinks", "m", "--tau", "0"], ["sinks", "m", "--max-dims=17"]],
)
def test_bad_options_are_errors(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", *options])
    assert ended.value.code == 2
    assert "usage: headway calibrate" in capsys.readouterr().err
