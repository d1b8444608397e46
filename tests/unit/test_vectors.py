"""The file of a vector profile: what is written is read, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from headway.server.engine.geometry import load_profiles
from headway.steering import ModelGeometry, SteeringError, vectors
from headway.steering.profiles import NamedProfiles
from headway.steering.vectors import (
    METADATA_KEY,
    FeedbackRule,
    VectorProfile,
    file_digest,
    given_artifacts,
)
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(4, 4, 2, 8, 32, architecture="LlamaForCausalLM")
KINDS = ("gact", "caa", "act")


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_survives_being_saved(tmp_path, kind):
    profile = drawn_profile(GEOMETRY, kind, licence="Apache-2.0", training={"pairs": 84})
    digest = profile.save(tmp_path / "a.safetensors")
    found = VectorProfile.load(tmp_path / "a.safetensors")
    assert found.header == profile.header
    assert found.digest == digest == file_digest(tmp_path / "a.safetensors")
    for name, array in profile.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)
    assert profile.save(tmp_path / "b.safetensors") == digest
    found.check_model(GEOMETRY)


def test_the_artefacts_of_the_layers():
    profile = drawn_profile(GEOMETRY, layers=(0, 3))
    assert list(profile.artifacts) == [0, 3] and profile.num_clusters == 3
    np.testing.assert_array_equal(profile.artifacts[3].directions, profile.tensors["directions"][1])
    np.testing.assert_array_equal(profile.artifacts[3].probe_bias, profile.tensors["probe_bias"][1])
    fixed = drawn_profile(GEOMETRY, "caa").artifacts[1]
    assert fixed.num_clusters == 1 and not fixed.probe_weights.any()
    assert drawn_profile(GEOMETRY, "act").artifacts == {}


def test_a_server_knows_the_artefacts_that_it_was_started_with(tmp_path):
    paths = {}
    for kind in KINDS:
        drawn_profile(GEOMETRY, kind).save(tmp_path / f"{kind}.safetensors")
        paths[kind] = str(tmp_path / f"{kind}.safetensors")
    profiles = load_profiles(paths, GEOMETRY)
    assert [profiles[kind].kind for kind in KINDS] == list(KINDS)
    served = replace(GEOMETRY, profiles=NamedProfiles(profiles))
    assert len(given_artifacts(served)) == 4  # two layers of gact, two of caa
    assert given_artifacts(GEOMETRY) == {}


def changed(tensors: dict, name: str, array: np.ndarray | None) -> dict:
    rest = {key: value for key, value in tensors.items() if key != name}
    return rest if array is None else {**rest, name: array}


FULL = drawn_profile(GEOMETRY).tensors
BAD = FULL["directions"].copy()
BAD[0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("probe_bias", None, "probe_bias: the tensor is missing"),
        ("extra", np.zeros(1, np.float32), "extra: unknown tensor"),
        ("directions", BAD, "directions: holds values that are not finite"),
        ("probe_weights", FULL["probe_weights"][:, :2], r"has shape \[2, 2, 32\]; expected \[2, 3"),
        ("directions", FULL["directions"][..., :16], r"\[2, 3, 16\]; expected \[2, 3, 32\]"),
        ("directions", FULL["directions"][0], "has shape"),
        ("probe_bias", FULL["probe_bias"].astype(np.float64), "float64; expected float32"),
    ],
)
def test_tensors_that_do_not_fit(name, array, words):
    header = drawn_profile(GEOMETRY).header
    with pytest.raises(SteeringError, match=words):
        VectorProfile(header, changed(dict(FULL), name, array))


def test_too_many_directions():
    with pytest.raises(SteeringError, match=r"17 directions a layer; allowed: 1 \.\. 16"):
        drawn_profile(GEOMETRY, num_clusters=17)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": []}, "header.layers: .*needs at least one"),
        ({"layers": [2, 1]}, "the layers must ascend"),
        ({"layers": [1, 4]}, "layer 4 does not exist"),
        ({"heads": [[0, 0]]}, "header.heads: .*has none"),
        ({"kind": "other"}, "header.kind"),
        ({"strength": 1000}, "header.strength"),
        ({"site": "mlp"}, "header.site"),
        ({"fingerprint": "x"}, "header.fingerprint"),
        ({"surprise": 1}, "unknown key"),
        ({"kind": "caa", "feedback": {}}, "has no probe to refine"),
    ],
)
def test_headers_that_do_not_fit(tmp_path: Path, changes, words):
    path = tmp_path / "a.safetensors"
    header = json.loads(drawn_profile(GEOMETRY).header.model_dump_json())
    metadata = {METADATA_KEY: json.dumps({**header, **changes})}
    save_file(dict(FULL), path, metadata=metadata)
    with pytest.raises(SteeringError, match=words):
        VectorProfile.load(path)


def test_files_that_are_no_profile(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.safetensors"
    with pytest.raises(SteeringError, match="cannot be read as a vector profile"):
        VectorProfile.load(path)
    path.write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(SteeringError, match="cannot be read as a vector profile"):
        VectorProfile.load(path)
    save_file(dict(FULL), path)
    with pytest.raises(SteeringError, match="without the metadata 'headway'"):
        VectorProfile.load(path)
    save_file(dict(FULL), path, metadata={METADATA_KEY: "{"})
    with pytest.raises(SteeringError, match="cannot be read as a vector profile"):
        VectorProfile.load(path)
    monkeypatch.setattr(vectors, "MAX_VECTORS_BYTES", 100)
    with pytest.raises(SteeringError, match="at most 100 are allowed") as caught:
        VectorProfile.load(path)
    assert caught.value.status == 413


def test_a_profile_of_another_model():
    other = ModelGeometry(4, 4, 2, 16, 32, architecture="LlamaForCausalLM")
    with pytest.raises(SteeringError, match="made for another model") as caught:
        drawn_profile(GEOMETRY).check_model(other)
    assert caught.value.reason == "E_PROFILE_MISMATCH"


def test_feedback_is_for_probes():
    assert drawn_profile(GEOMETRY, feedback=FeedbackRule(batch=2)).header.feedback.batch == 2
