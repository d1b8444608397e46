"""Preset files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headway.server.http.presets import PresetError, load_presets
from headway.steering import ModelGeometry

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(4, 4, 2, 64, 256)
METHODS = [{"method": "head_ablation", "heads": [[1, 2]]}]


def write(folder: Path, content: Any, name: str = "quiet") -> str:
    path = folder / "preset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"{name}={path}"


def test_a_preset_is_compiled_when_it_is_loaded(tmp_path: Path) -> None:
    presets = load_presets([write(tmp_path, {"methods": METHODS, "description": "d"})], GEOMETRY)
    shown = presets["quiet"].as_dict()
    assert shown["methods"] == METHODS
    assert shown["description"] == "d"
    assert shown["fingerprint"] == presets["quiet"].program.fingerprint


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Expecting"),
        ([], '"methods"'),
        ({"methods": METHODS, "colour": 1}, "'colour'"),
        ({"methods": METHODS, "description": 1}, "description"),
        ({"methods": METHODS, "description": "\ud800"}, "description"),
        ({"methods": METHODS, "description": "x" * 1025}, "description"),
        ({"methods": []}, "methods"),
        ({"methods": [{"method": "nope"}]}, 'no method "nope"'),
        ({"methods": [{"method": "head_ablation", "heads": [[9, 0]]}]}, "layer 9"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, content: Any, problem: str) -> None:
    option = write(tmp_path, content)
    with pytest.raises(PresetError) as caught:
        load_presets([option], GEOMETRY)
    assert problem in str(caught.value)
    assert option in str(caught.value)


@pytest.mark.parametrize("name", ["a:b", "", "-x", "x" * 65, "a b"])
def test_a_name_must_fit_into_an_alias(tmp_path: Path, name: str) -> None:
    with pytest.raises(PresetError, match="a name is made of"):
        load_presets([write(tmp_path, {"methods": METHODS}, name)], GEOMETRY)


def test_names_are_given_once(tmp_path: Path) -> None:
    option = write(tmp_path, {"methods": METHODS})
    with pytest.raises(PresetError, match="twice"):
        load_presets([option, option], GEOMETRY)


@pytest.mark.parametrize("option", ["quiet", "quiet=", "quiet=/no/such/file"])
def test_an_option_names_a_file(option: str) -> None:
    with pytest.raises(PresetError, match=f"--steering-preset {option}"):
        load_presets([option], GEOMETRY)
