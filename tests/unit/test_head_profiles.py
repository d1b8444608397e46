"""Head profiles: the files, how a server comes by them, and VHR with the heads of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.server.engine.geometry import load_profiles, sink_profile
from headway.steering import ModelGeometry, SteeringError, compile_spec, parse_spec
from headway.steering.head_words import HeadField
from headway.steering.heads import HeadProfile
from headway.steering.profiles import NamedProfiles
from headway.steering.program import SteeringProgram
from headway.steering.sinks import SinkProfile

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(3, 4, 2, 16, 64, supports_images=True, architecture="Llava")
HEADS = ((0, 3), (2, 0), (2, 1))


def make(geometry: ModelGeometry = GEOMETRY) -> HeadProfile:
    return HeadProfile.of(
        geometry,
        num_heads=4,
        heads=HEADS,
        layers=(0, 2),
        alpha=2.0,
        num_images=5,
        questions=("Is there a fork in the image?",),
        vhd=((0.0, 0.25, 0.5, 1.0), (0.0,) * 4, (3.0, 2.0, 1.0, 0.0)),
    )


SERVED = replace(GEOMETRY, profiles=NamedProfiles({"demo": make(), "other": make()}))


def write(folder: Path, name: str = "heads.json", **changes: Any) -> Path:
    """A profile file with some keys replaced, or dropped where the new value is `...`."""
    content = {**make().model_dump(mode="json"), **changes}
    content = {key: value for key, value in content.items() if value is not ...}
    path = folder / name
    path.write_text(json.dumps(content))
    return path


# Files


def test_a_profile_survives_being_saved(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    make().save(path)
    assert HeadProfile.load(path) == make()
    assert list(json.loads(path.read_text()))[:2] == ["kind", "version"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"kind": "sinks"}, "profile.kind", "heads"),
        ({"version": 2}, "profile.version", "1"),
        ({"colour": 1}, "profile.colour", "unknown key"),
        ({"fingerprint": "abc"}, "profile.fingerprint", "pattern"),
        ({"heads": []}, "profile.heads", "at least 1"),
        ({"heads": [[0, 3], [2]]}, "profile.heads[1]", "required"),
        ({"heads": [[0, 3], [2, 4]]}, "profile.heads[1][1]", "0 .. 3"),
        ({"heads": [[0, 3], [1, 0]]}, "profile.heads[1][0]", "none of `layers`"),
        ({"heads": [[2, 0], [0, 3]]}, "profile.heads[1]", "ascend"),
        ({"heads": [[0, 3], [0, 3]]}, "profile.heads[1]", "ascend"),
        ({"heads": [[0, -1]]}, "profile.heads[0][1]", "-1"),
        ({"layers": [0, 3]}, "profile.layers[1]", "0 .. 2"),
        ({"layers": [2, 0]}, "profile.layers[1]", "ascend"),
        ({"alpha": 0}, "profile.alpha", "greater than 0"),
        ({"num_images": 0}, "profile.num_images", "greater than 0"),
        ({"questions": []}, "profile.questions", "at least 1"),
        ({"vhd": ...}, "profile.vhd", "required"),
        ({"vhd": [[0.0] * 4] * 2}, "profile.vhd", "2 rows; the model has 3 layers"),
        ({"vhd": [[0.0] * 4, [0.0] * 3, [0.0] * 4]}, "profile.vhd[1]", "3 values"),
        ({"vhd": [[0.0] * 4, [0.0] * 4, [float("inf")] * 4]}, "profile.vhd[2][0]", "finite"),
        ({"vhd": [[0.0] * 4, [0.0] * 4, [0.0, -1.0, 0.0, 0.0]]}, "profile.vhd[2][1]", "-1.0"),
    ],
)
def test_a_malformed_profile_names_the_key(
    tmp_path: Path, changes: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(SteeringError) as caught:
        HeadProfile.load(write(tmp_path, **changes))
    assert (caught.value.reason, caught.value.param) == ("E_BAD_PARAM", param)
    assert words in caught.value.message


def test_profiles_of_large_models_are_larger_than_a_request_may_be(tmp_path: Path) -> None:
    geometry = ModelGeometry(80, 64, 8, 128, 8192, architecture="Llava")
    profile = HeadProfile.of(
        geometry,
        **make().model_dump(include={"alpha", "num_images", "questions"}),
        num_heads=64,
        heads=tuple((layer, head) for layer in range(80) for head in range(32)),
        layers=tuple(range(80)),
        vhd=((12.345678,) * 64,) * 80,
    )
    profile.save(tmp_path / "heads.json")
    assert HeadProfile.load(tmp_path / "heads.json") == profile
    path = write(tmp_path, questions=["?" * 2**20])
    with pytest.raises(SteeringError, match="at most 1048576"):
        HeadProfile.load(path)


# In the server


def write_sinks(folder: Path, name: str) -> Path:
    profile = SinkProfile.of(
        GEOMETRY,
        dims=(5,),
        tau=20.0,
        num_prompts=1,
        num_tokens=2,
        sink_tokens=0,
        measurements=(
            {"dim": 5, "phi_first": (1.0,) * 3, "phi_other": (1.0,) * 3, "sink_tokens": 0},
        ),
    )
    profile.save(folder / name)
    return folder / name


def test_profiles_of_both_kinds_go_together(tmp_path: Path) -> None:
    paths = {
        "b": str(write(tmp_path, "b.json")),
        "sinks": str(write_sinks(tmp_path, "sinks.json")),
        "a": str(write(tmp_path, "a.json", heads=[[0, 1]])),
    }
    profiles = load_profiles(paths, GEOMETRY)
    assert list(profiles) == ["a", "b", "sinks"]
    assert [profiles[name].heads for name in ("a", "b")] == [((0, 1),), HEADS]
    found = sink_profile(profiles)
    assert found is not None and found.dims == (5,)
    assert sink_profile(load_profiles({"b": paths["b"]}, GEOMETRY)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "moods"}, 'profile.kind: must be one of sinks, heads, got "moods"'),
        ({"kind": ...}, "profile.kind: must be one of sinks, heads, got null"),
        ({"alpha": "high"}, "profile.alpha: "),
        ({"fingerprint": "0" * 16}, "made for another model: Llava with 3 layers"),
    ],
)
def test_a_bad_profile_ends_the_start(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = str(write(tmp_path, **changes))
    with pytest.raises(ValueError, match=rf"steering profile mine \({path}\): .*{words}"):
        load_profiles({"mine": path}, GEOMETRY)


def test_a_file_that_holds_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="profile.kind: must be one of sinks, heads"):
        load_profiles({"mine": str(path)}, GEOMETRY)


def test_head_profiles_do_not_change_the_fingerprint_they_name() -> None:
    assert SERVED.fingerprint == GEOMETRY.fingerprint
    assert SERVED == GEOMETRY


# In a request


def compiled(geometry: ModelGeometry = SERVED, **options: Any) -> SteeringProgram:
    return compile_spec(parse_spec({"methods": [{"method": "vhr", **options}]}), geometry)


def test_vhr_takes_the_heads_of_a_profile() -> None:
    program = compiled(profile="demo", alpha=1.5)
    [edit] = program.head_edits
    scale = np.ones((3, 4), np.float32)
    scale[tuple(zip(*HEADS, strict=True))] = 1.5
    np.testing.assert_array_equal(edit.words.table[..., HeadField.SCALE], scale)
    assert (
        program.fingerprint == compiled(heads=[list(pair) for pair in HEADS], alpha=1.5).fingerprint
    )
    [applied] = program.applied
    assert applied.details == {
        "profile": "demo",
        "alpha": 1.5,
        "layers": [0, 2],
        "heads": [[0, 3], [2, 0], [2, 1]],
        "scope": "all",
    }


def test_heads_given_one_by_one_name_no_profile() -> None:
    [applied] = compiled(heads=[[0, 0]]).applied
    assert "profile" not in applied.details


@pytest.mark.parametrize(
    ("options", "reason", "param", "words"),
    [
        ({"profile": "none"}, "E_PROFILE_NOT_FOUND", "profile", 'profile "none"; .*: demo, other'),
        ({"profile": "demo", "heads": [[0, 0]]}, "E_BAD_PARAM", "heads", "leave `heads` out"),
        ({"profile": "demo", "heads": "auto"}, "E_BAD_PARAM", "heads", "leave `heads` out"),
        ({"profile": "demo", "layers": [0]}, "E_BAD_PARAM", "layers", "leave `layers` out"),
        ({"profile": 3}, "E_BAD_PARAM", "profile", "string"),
    ],
)
def test_profiles_that_cannot_be_used(
    options: dict[str, Any], reason: str, param: str, words: str
) -> None:
    with pytest.raises(SteeringError, match=words) as caught:
        compiled(**options)
    assert caught.value.reason == reason
    assert caught.value.param == f"steering.methods[0].{param}"
    assert caught.value.status == (404 if reason == "E_PROFILE_NOT_FOUND" else 400)


def test_a_server_without_head_profiles() -> None:
    with pytest.raises(SteeringError, match="the profiles are: none"):
        compiled(GEOMETRY, profile="demo")
