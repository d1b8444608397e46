"""`headway compile`: programs and errors without an engine."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headway.server.commands import compile as command
from headway.server.commands.model import read_model, steerable_geometry
from headway.steering import ModelGeometry, compile_spec, parse_spec

GEOMETRY = ModelGeometry(4, 4, 2, 64, 256, architecture="LlamaForCausalLM")
METHODS = [{"method": "vhr", "alpha": 2.0, "heads": [[1, 2]]}]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of known sizes instead of one that is read from disk."""
    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    monkeypatch.setattr(command, "read_model", lambda model: config)
    monkeypatch.setattr(command, "steerable_geometry", lambda config: GEOMETRY)


def run(body: Any, monkeypatch: pytest.MonkeyPatch, *options: str, path: str = "-") -> int:
    text = body if isinstance(body, str) else json.dumps(body)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return command.main([path, "--model", "unused", *options])


@pytest.mark.unit
def test_a_valid_request_is_summarised(
    model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run({"steering": {"methods": METHODS}}, monkeypatch) == 0
    shown = json.loads(capsys.readouterr().out)
    program = compile_spec(parse_spec({"methods": METHODS}), GEOMETRY)
    assert shown["fingerprint"] == program.fingerprint
    assert shown["identity"] is False
    assert shown["features"] == ["head_affine"]
    assert shown["methods"][0]["heads"] == [[1, 2]]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("body", "reason", "param"),
    [
        (
            {"steering": {"methods": [{**METHODS[0], "heads": [[4, 0]]}]}},
            "E_LAYER_RANGE",
            "steering.methods[0].heads[0][0]",
        ),
        ({"steering": {"methods": [{"method": "x"}]}}, "E_UNKNOWN_METHOD", None),
        ({"steering": {"preset": "loud"}}, "E_PRESET_NOT_FOUND", "steering.preset"),
        ({"messages": []}, "E_BAD_PARAM", "steering"),
        ("{", "E_BAD_PARAM", "request"),
        ("[]", "E_BAD_PARAM", "request"),
    ],
)
def test_an_error_has_the_shape_of_a_server_s(
    body: Any,
    reason: str,
    param: str | None,
    model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(body, monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error = json.loads(shown.err)["error"]
    assert error["reason"] == reason
    assert param in (None, error["param"])
    assert error.keys() == {"message", "type", "param", "code", "reason"}


@pytest.mark.unit
@pytest.mark.parametrize("body", [{"steering": {"preset": "loud"}}, {"model": "any/name:loud"}])
def test_presets_come_from_files_and_are_aliases(
    body: dict[str, Any],
    tmp_path: Path,
    model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "loud.json"
    path.write_text(json.dumps({"methods": METHODS}))
    assert run(body, monkeypatch, "--steering-preset", f"loud={path}") == 0
    assert json.loads(capsys.readouterr().out)["methods"][0]["method"] == "vhr"


@pytest.mark.unit
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path,
    model: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("", monkeypatch, path=str(tmp_path / "gone.json")) == 2
    assert "gone.json" in capsys.readouterr().err
    assert run({}, monkeypatch, "--steering-preset", "loud=/gone/too.json") == 2
    assert "--steering-preset loud=/gone/too.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_sizes_of_a_model_are_read_from_its_configuration(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert steerable_geometry(read_model(str(tmp_path))) == GEOMETRY
