"""headway bench vectors, without an engine: controls, figures, table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headway.benchmarks import vectors
from headway.benchmarks.vectors import Arm, drawn, is_well_formed, repeated_share, report, table
from headway.steering import ModelGeometry, parse_spec
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(4, 4, 2, 8, 32)
CPP = "```cpp\n#include <vector>\nint main() { return 0; }\n```"
PYTHON = "```python\ndef f(x):\n    return x\n```"
ARMS = [Arm("unsteered"), Arm("strength 2", "profile", 2.0), Arm("drawn", "drawn", 2.0)]
ANSWERS = {
    "unsteered": [PYTHON] * 30 + [CPP] * 10,
    "strength 2": [CPP] * 40,
    "drawn": ["no no no no no no no no no"] * 40,
}
PERPLEXITIES = {"unsteered": 20.0, "strength 2": 22.0, "drawn": 30.0}


@pytest.mark.parametrize("kind", ["gact", "caa", "act"])
def test_the_control_has_other_directions_of_the_same_lengths(kind):
    profile = drawn_profile(GEOMETRY, kind)
    control = drawn(profile, seed=3)
    name = "shifts" if kind == "act" else "directions"
    for given, other in zip(profile.tensors[name], control.tensors[name], strict=True):
        lengths = (np.linalg.norm(each, axis=-1) for each in (given, other))
        np.testing.assert_allclose(*lengths, rtol=1e-5)
        assert not np.allclose(given, other)
    for same in set(profile.tensors) - {name}:
        np.testing.assert_array_equal(control.tensors[same], profile.tensors[same])


def test_every_arm_but_the_first_is_a_valid_spec():
    assert ARMS[0].spec("gact", "all") is None
    spec = parse_spec(ARMS[1].spec("gact", "all"))
    assert spec.methods == [
        {"method": "gact", "profile": "profile", "strength": 2.0, "scope": "all"}
    ]


def test_what_is_well_formed():
    assert is_well_formed(CPP) and is_well_formed(PYTHON)
    assert not is_well_formed("```cpp\nint x;")
    assert not is_well_formed("int x;")
    assert not is_well_formed("```cpp\n" + "int x = 1 ; " * 20 + "\n```")
    assert repeated_share("a b c") == 0.0


def test_the_report_and_its_table():
    result = report(ARMS, ANSWERS, PERPLEXITIES, "C++")
    unsteered, steered, control = result["arms"]
    assert unsteered["target_share"]["value"] == 0.25
    assert unsteered["languages"] == {"C++": 0.25, "Python": 0.75}
    assert steered["target_share"]["value"] == 1.0
    gained = steered["target_share_gained"]
    assert gained["value"] == 0.75 and gained["low"] > 0.5 and gained["p"] < 0.01
    assert control["well_formed"]["value"] == 0.0 and control["repeated"] > 0.5
    text = table({**result, "model": "m"})
    assert "40 held-out prompts" in text and "0.250 [" in text and "30.00" in text


def test_a_run_from_the_command_line(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "p.safetensors"
    drawn_profile(GEOMETRY, strength=4.0).save(path)

    def serve(model, paths, kind, arms, prompts, dtype):
        assert kind == "gact" and set(paths) == {"profile", "drawn"}
        assert [arm.strength for arm in arms] == [0.0, 2.0, 4.0, 8.0, 4.0]
        assert len(prompts) == 3
        return {arm.name: [CPP] * 3 for arm in arms}, {arm.name: 9.0 for arm in arms}

    monkeypatch.setattr(vectors, "serve", serve)
    output = tmp_path / "out.json"
    options = ["--profile", str(path), "--model", str(tmp_path), "--prompts", "3"]
    assert vectors.main([*options, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [arm["name"] for arm in found["arms"]][1] == "strength 2"
    assert found["profile"]["kind"] == "gact"
    assert "answers in C++" in capsys.readouterr().out


def test_a_file_that_is_no_profile(tmp_path: Path, capsys):
    (tmp_path / "x").write_text("no")
    assert vectors.main(["--profile", str(tmp_path / "x")]) == 2
    assert "cannot be read as a vector profile" in capsys.readouterr().err
