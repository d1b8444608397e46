"""Artefacts of residual edits: what they refuse, their names, and how they travel."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from headway.server.engine.artifact_shelf import ArtifactShelf
from headway.server.engine.worker_rpc import SteeringRpc
from headway.steering.artifacts import ResidualArtifact, decode_artifact, encode_artifact
from headway.steering.program import ResidualEdit
from tests.residual import drawn_artifact

pytestmark = pytest.mark.unit


def test_the_name_is_the_content():
    assert drawn_artifact(1, 16).digest == drawn_artifact(1, 16).digest
    assert drawn_artifact(1, 16).digest != drawn_artifact(2, 16).digest
    one = drawn_artifact(1, 16)
    moved = ResidualArtifact(one.directions, one.probe_weights, one.probe_bias + np.float32(1))
    assert moved.digest != one.digest


def test_it_travels_as_plain_values():
    sent = drawn_artifact(3, 24, num_clusters=5)
    got = decode_artifact(encode_artifact(sent))
    assert got.digest == sent.digest and got.num_clusters == 5
    assert (got.directions == sent.directions).all()
    got.directions[0, 0] = 1.0  # its own memory


@pytest.mark.parametrize("name", ["directions", "probe_weights", "probe_bias"])
def test_damage_is_noticed(name):
    wire = encode_artifact(drawn_artifact(3, 24))
    damaged = bytearray(wire[name])
    damaged[5] ^= 1
    with pytest.raises(ValueError, match="not what its name says|finite"):
        decode_artifact({**wire, name: bytes(damaged)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"directions": np.zeros((3, 8))}, "finite float32"),
        ({"probe_bias": np.full(3, np.nan, np.float32)}, "finite float32"),
        ({"directions": np.zeros(8, np.float32)}, r"\[num_clusters, hidden_size\]"),
        ({"probe_weights": np.zeros((3, 9), np.float32)}, "shaped as directions"),
        ({"probe_bias": np.zeros(2, np.float32)}, "every cluster"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, words):
    values = {
        "directions": np.zeros((3, 8), np.float32),
        "probe_weights": np.zeros((3, 8), np.float32),
        "probe_bias": np.zeros(3, np.float32),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        ResidualArtifact(**values)


def test_one_direction_needs_no_probe():
    direction = np.arange(4, dtype=np.float32)
    artifact = ResidualArtifact.constant(direction)
    assert artifact.num_clusters == 1 and (artifact.directions[0] == direction).all()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        ResidualEdit(1, "0" * 64, strength)


def test_more_directions_than_a_worker_has_room_for_are_refused():
    worker = SteeringRpc()
    shelf = ArtifactShelf(max_clusters=4)
    worker.model_runner = SimpleNamespace(steering=SimpleNamespace(artifacts=shelf))
    fits, other, large = (encode_artifact(drawn_artifact(1, 8, count)) for count in (4, 3, 5))
    assert worker.headway_load_artifacts([fits]) == [fits["digest"]]
    with pytest.raises(ValueError, match="5 directions; at most 4"):
        worker.headway_load_artifacts([other, large])
    assert list(shelf.artifacts) == [fits["digest"]]


def test_a_worker_keeps_what_anybody_holds():
    shelf, artifact = ArtifactShelf(), drawn_artifact(1, 8)
    for holder in ("one", "other", "one"):
        shelf.load([artifact], holder)
    assert shelf.unload([artifact.digest], "a third") == 0
    assert shelf.unload([artifact.digest], "one") == 1
    assert shelf.unload([artifact.digest], "one") == 0
    assert artifact.digest in shelf.artifacts
    assert shelf.unload([artifact.digest], "other") == 1
    assert not shelf.artifacts
