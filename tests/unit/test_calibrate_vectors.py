"""`headway calibrate gact`, `caa` and `act`: pairs, activations and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headway.server import cli
from headway.server.calibration import activations, gact, residual
from headway.server.calibration.activations import Reading
from headway.server.calibration.pairs import Pair, read_pairs
from headway.server.commands import calibrate_options, calibrate_vectors
from headway.steering import ModelGeometry
from headway.steering.program import ResidualSite
from headway.steering.vectors import FeedbackRule, VectorProfile, file_digest

pytestmark = pytest.mark.unit

HIDDEN, LAYERS, HEADS, HEAD_SIZE = 32, 5, 4, 8
GEOMETRY = ModelGeometry(LAYERS, HEADS, 2, HEAD_SIZE, HIDDEN, architecture="LlamaForCausalLM")
TEXTS = {"C++": "int x;", "Python": "x = 1", "Java": "int[] x;"}


# Pairs


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_pairs_of_both_forms(tmp_path: Path) -> None:
    plain = {"prompt": "p", "target": "t", "other": "o", "id": 3}
    several = {"prompt": "q", "target": "t", "other": ["o", "u"], "topic": "loops"}
    path = write(tmp_path / "pairs.jsonl", *[plain, several, ""] * 4)
    assert read_pairs(path)[:2] == (Pair("p", "t", ("o",)), Pair("q", "t", ("o", "u"), "loops"))
    path = write(path, *[{"prompt": "p", "continuations": TEXTS}] * 8)
    assert read_pairs(path, "Python")[0] == Pair("p", "x = 1", ("int x;", "int[] x;"))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_line_feeds_end_a_line(separator: str, tmp_path: Path) -> None:
    """JSON holds the other separators of lines in its strings as they are."""
    pair = {"prompt": f"p{separator}q", "target": "t", "other": "o"}
    path = tmp_path / "pairs.jsonl"
    lines = "\r\n".join([json.dumps(pair, ensure_ascii=False)] * 8)
    path.write_bytes(lines.encode())
    assert read_pairs(path) == (Pair(f"p{separator}q", "t", ("o",)),) * 8


@pytest.mark.parametrize(
    ("line", "target", "words"),
    [
        ("{", None, "line 2: is not JSON"),
        ("[]", None, "line 2: must be a JSON object"),
        ({"target": "t", "other": "o"}, None, 'line 2: "prompt" must be a text'),
        ({"prompt": "p", "target": " ", "other": "o"}, None, '"target" must be a text'),
        ({"prompt": "p", "target": "t"}, None, '"other" must be a text'),
        ({"prompt": "p", "target": "t", "other": []}, None, '"other" holds no text'),
        ({"prompt": "p", "target": "t", "other": ["o", 1]}, None, '"other" must be a text'),
        ({"prompt": "p", "target": "t", "other": ["o", "t"]}, None, "also an unwanted one"),
        ({"prompt": "p", "target": "t", "other": "o", "topic": 1}, None, '"topic" must be'),
        ({"prompt": "p", "target": "t", "other": "o"}, "C++", "--target needs"),
        ({"prompt": "p", "continuations": TEXTS}, None, "--target which .* C\\+\\+, Python, Java"),
        ({"prompt": "p", "continuations": TEXTS}, "Julia", "no continuation 'Julia'"),
        ({"prompt": "p", "continuations": {"C++": "x"}}, "C++", "at least two labels"),
        ({"prompt": "p", "continuations": TEXTS, "other": "o"}, "C++", 'and "other"'),
    ],
)
def test_lines_that_are_no_pair(line: Any, target: str | None, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", "", line)
    with pytest.raises(ValueError, match=words) as raised:
        read_pairs(path, target)
    assert "pairs.jsonl, line 2: " in str(raised.value)


def test_too_few_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", *[{"prompt": "p", "target": "t", "other": "o"}] * 7)
    with pytest.raises(ValueError, match="holds 7 pairs; at least 8"):
        read_pairs(path)


# Activations


class Tokenizer:
    """Takes letters for tokens."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) % 60 + 2 for letter in text]}


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of random weights, large enough for its layers to differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


PAIR = Pair("sort", "int x;", ("x = 1", "x"))


def streams_of(model: Any, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What enters each layer, enters its MLP's norm and its output projection, by transformers."""
    tokens = torch.tensor([Tokenizer()(text)["input_ids"]])
    middle, heads = [], []
    handles = [
        hooked.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0][0]))
        for layer in model.model.layers
        for hooked, kept in (
            (layer.post_attention_layernorm, middle),
            (layer.self_attn.o_proj, heads),
        )
    ]
    with torch.inference_mode():
        entering = model(tokens, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return torch.stack([each[0] for each in entering]), torch.stack(middle), torch.stack(heads)


def test_rows_are_those_that_transformers_reports(model: Any) -> None:
    wanted = streams_of(model, "sort" + "int x;")
    taps = [
        activations.stream_taps(model, ResidualSite.BLOCK_OUTPUT)[:-1],  # the last one is normed
        activations.stream_taps(model, ResidualSite.AFTER_ATTENTION),
        activations.head_taps(model),
    ]
    for group, expected in zip(taps, (wanted[0][1:-1], wanted[1], wanted[2]), strict=True):
        rows = activations.pair_rows(model, Tokenizer(), [PAIR], group, Reading.LAST, 1)
        np.testing.assert_allclose(rows.targets[0], expected[:, -1], atol=1e-5)
        np.testing.assert_allclose(rows.prompts[0], expected[:, 4], atol=1e-5)
        rows = activations.pair_rows(model, Tokenizer(), [PAIR], group, Reading.MEAN, 1)
        np.testing.assert_allclose(rows.targets[0], expected[:, 5:].mean(dim=1), atol=1e-5)
    assert rows.others[0].shape == (2, LAYERS, HIDDEN)
    last = activations.pair_rows(model, Tokenizer(), [PAIR], taps[1], Reading.LAST, 4)
    np.testing.assert_allclose(
        last.others[0][1], streams_of(model, "sort" + "x")[1][:, -1], atol=1e-5
    )


def test_the_last_block_is_read_before_the_final_norm(model: Any) -> None:
    taps = activations.stream_taps(model, ResidualSite.BLOCK_OUTPUT)
    rows = activations.pair_rows(model, Tokenizer(), [PAIR], taps, Reading.LAST, 1)
    normed = model.model.norm(torch.from_numpy(rows.targets[0, -1])).detach()
    expected = streams_of(model, "sort" + "int x;")[0][-1, -1]
    np.testing.assert_allclose(normed, expected, atol=1e-5)


@pytest.mark.parametrize("reading", Reading)
def test_batches_and_padding_change_nothing(model: Any, reading: Reading) -> None:
    pairs = [PAIR, Pair("a", "b" * 30, ("c",)), Pair("find the mean", "d", ("ef", "g" * 9))]
    taps = activations.stream_taps(model, ResidualSite.BLOCK_OUTPUT)
    alone, together = (
        activations.pair_rows(model, Tokenizer(), pairs, taps, reading, size) for size in (1, 5)
    )
    np.testing.assert_allclose(alone.prompts, together.prompts, atol=1e-4)
    np.testing.assert_allclose(alone.differences, together.differences, atol=1e-4)


def test_layers_without_the_site(model: Any) -> None:
    class Parallel(torch.nn.Module):
        config = model.config

        def get_decoder(self) -> Any:
            return torch.nn.Module()

    layer = torch.nn.Module()
    with pytest.raises(ValueError, match="no norm between attention and MLP"):
        activations._mlp_norm(Parallel(), layer)
    # Norms of what attention and MLP return, not of the stream.
    layer.post_attention_layernorm = layer.post_feedforward_layernorm = torch.nn.Identity()
    with pytest.raises(ValueError, match="no norm between attention and MLP"):
        activations._mlp_norm(Parallel(), layer)
    layer.pre_feedforward_layernorm = norm = torch.nn.Identity()
    assert activations._mlp_norm(Parallel(), layer) is norm


def test_a_text_without_positions(model: Any) -> None:
    taps = activations.stream_taps(model, ResidualSite.BLOCK_OUTPUT)
    with pytest.raises(ValueError, match="has 65 tokens; at most 64"):
        pair = Pair("p" * 60, "abcd", ("x",))
        activations.pair_rows(model, Tokenizer(), [pair], taps, Reading.LAST, 2)


# The commands


@pytest.fixture
def pairs(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of pairs, in an empty folder, and the commands on the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate_vectors, "read_model", lambda name: name)
    monkeypatch.setattr(calibrate_vectors, "steerable_geometry", lambda config: GEOMETRY)
    monkeypatch.setattr(residual, "load_model", lambda name: (model, Tokenizer()))
    lines = []
    for index in range(24):
        kind = "sort" if index % 3 else "mean"
        wanted = "int x;" if index % 3 else "double mean() {}"
        lines.append(
            {
                "prompt": f"{kind} {chr(65 + index)} {kind}",
                "continuations": {"C++": wanted, "Python": "x = 1", "Julia": f"x{index} end"},
            }
        )
    return write(tmp_path / "pairs.jsonl", *lines)


def run(*options: str) -> int:
    kind, *rest = options
    return cli.main(["calibrate", kind, "org/m", "--target", "C++", *rest])


def test_gact_from_pairs_to_files(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--clusters", "2", "--num-layers", "2", "--feedback", "--licence", "MIT"]
    options += ["--report", "r.json", "--plot", "p.png", "--batch-size", "5"]
    for name in ("a", "b"):
        assert run("gact", "--pairs", str(pairs), *options, "--output", name) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    profile = VectorProfile.load(tmp_path / "a")
    profile.check_model(GEOMETRY)
    header = profile.header
    assert (header.kind, header.licence, header.feedback) == ("gact", "MIT", FeedbackRule())
    assert header.strength == pytest.approx(0.1 * HIDDEN**0.5, abs=1e-4)
    assert header.command == (
        "headway calibrate gact org/m --pairs pairs.jsonl --target C++ --batch-size 5 "
        "--licence MIT --clusters 2 --num-layers 2 --feedback"
    )
    assert header.training["num_pairs"] == 24
    assert header.training["pairs_sha256"] == file_digest(pairs)
    assert profile.tensors["directions"].shape == (len(header.layers), 2, HIDDEN)
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["layers"]) == LAYERS
    assert report["command"] == header.command
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert f"sha256:{profile.digest}" in shown.out
    assert "activations: 100%" in shown.err
    assert "probes: 100%" in shown.err


def test_gact_at_named_layers_and_another_site(pairs: Path, tmp_path: Path) -> None:
    options = ["--layers", "3", "0-1", "--site", "after_attention", "--strength", "-2.5"]
    assert run("gact", "--pairs", "pairs.jsonl", "--clusters", "1", "--read", "last", *options) == 0
    profile = VectorProfile.load(tmp_path / "gact.safetensors")
    assert profile.header.layers == (0, 1, 3)
    assert profile.header.site is ResidualSite.AFTER_ATTENTION
    assert (profile.header.strength, profile.header.feedback) == (-2.5, None)
    assert "--layers 3 0-1 --strength -2.5" in profile.header.command
    assert profile.header.training["read"] == "last"


def test_gact_where_no_probe_tells_anything(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gact, "choose_layers", lambda found, num: ())
    assert run("gact", "--pairs", "pairs.jsonl") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert "no layer's probe tells" in capsys.readouterr().err


def test_caa_takes_mean_differences(
    pairs: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("caa", "--pairs", "pairs.jsonl", "--layers", "1", "4") == 0
    profile = VectorProfile.load(tmp_path / "caa.safetensors")
    profile.check_model(GEOMETRY)
    taps = activations.stream_taps(model, ResidualSite.BLOCK_OUTPUT)
    read = read_pairs(pairs, "C++")
    rows = activations.pair_rows(model, Tokenizer(), read, taps, Reading.MEAN, 8)
    expected = rows.differences.mean(axis=0)[[1, 4]]
    np.testing.assert_allclose(profile.tensors["directions"][:, 0], expected, atol=1e-5)
    assert "*4" in capsys.readouterr().out
    assert run("caa", "--pairs", "pairs.jsonl", "--normalize") == 0
    profile = VectorProfile.load(tmp_path / "caa.safetensors")
    assert set(profile.header.layers) <= {1, 2, 3}
    assert np.linalg.norm(profile.tensors["directions"]) == pytest.approx(1)


def test_act_shifts_the_heads_that_tell(pairs: Path, tmp_path: Path) -> None:
    assert run("act", "--pairs", "pairs.jsonl", "--heads", "3") == 0
    profile = VectorProfile.load(tmp_path / "act.safetensors")
    profile.check_model(GEOMETRY)
    assert len(profile.header.heads) == 3
    assert profile.tensors["shifts"].shape == (3, HEAD_SIZE)
    assert profile.header.strength == 15.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gact", "--pairs", "/no/such/file"], "/no/such/file"),
        (["gact", "--pairs", "pairs.jsonl", "--layers", "5"], "layer 5 does not exist"),
        (["gact", "--pairs", "pairs.jsonl", "--clusters", "12"], "12 clusters of 19 prompts"),
        (["gact", "--pairs", "pairs.jsonl", "--folds", "25"], "too few for 25 folds"),
        (["gact", "--pairs", "pairs.jsonl", "--report", "/no/such/r"], "the folder does not"),
        (["caa", "--pairs", "pairs.jsonl", "--output", "/no/such/c"], "the folder does not"),
        (["act", "--pairs", "pairs.jsonl", "--target", "Ada"], "line 1: has no continuation 'Ada'"),
    ],
)
def test_what_cannot_be_used_is_named(
    options: list[str], words: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gact", "act"])
def test_without_scikit_learn(
    kind: str, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate_options, "find_spec", lambda name: None)
    assert run(kind, "--pairs", "pairs.jsonl") == 2
    assert 'pip install "headway[calibrate]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["gact"],
        ["gact", "--pairs", "p", "--clusters", "17"],
        ["gact", "--pairs", "p", "--strength", "101"],
        ["gact", "--pairs", "p", "--site", "block_input"],
        ["caa", "--pairs", "p", "--folds", "1"],
        ["act", "--pairs", "p", "--heads", "0"],
    ],
)
def test_bad_options_are_errors(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert ended.value.code == 2
    assert f"usage: headway calibrate {options[0]}" in capsys.readouterr().err
