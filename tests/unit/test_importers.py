"""Importers: control vectors and steering vectors become profiles, and what is refused."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from headway.server import importers
from headway.server.importers.formats import detect, read_vectors
from headway.server.importers.imported import ImportedVectors, make_profile
from headway.steering import ModelGeometry
from headway.steering.program import ResidualSite
from headway.steering.vectors import MAX_VECTORS_BYTES, VectorProfile

pytestmark = pytest.mark.unit

HIDDEN = 8
GEOMETRY = ModelGeometry(4, 4, 2, 2, HIDDEN, architecture="LlamaForCausalLM")


def direction(layer: int) -> np.ndarray:
    return np.arange(HIDDEN, dtype=np.float32) + 10 * layer


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    architecture: str = "controlvector",
    hint: str | None = "llama",
) -> Path:
    """A control vector as repeng's `export_gguf` and llama.cpp's generator lay it out."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_pt(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


# Control vectors of repeng


def test_a_control_vector_keeps_its_layers_and_values(tmp_path: Path) -> None:
    # From the last layer down, as repeng trains and writes them.
    tensors = {f"direction.{layer}": direction(layer) for layer in (3, 2, 1)}
    found = read_vectors(write_gguf(tmp_path / "happy.gguf", tensors))
    assert found.source_format == "repeng"
    assert found.facts == {"model_hint": "llama", "layer_count": 3}
    profile = make_profile(found, GEOMETRY, "MIT", "headway profile import happy.gguf")
    header = profile.header
    assert (header.kind, header.layers, header.site) == (
        "caa",
        (1, 2, 3),
        ResidualSite.BLOCK_OUTPUT,
    )
    assert (header.licence, header.command) == ("MIT", "headway profile import happy.gguf")
    assert header.training == {"source_format": "repeng", "model_hint": "llama", "layer_count": 3}
    expected = np.stack([direction(layer) for layer in (1, 2, 3)])[:, None]
    np.testing.assert_array_equal(profile.tensors["directions"], expected)
    profile.check_model(GEOMETRY)

    digest = profile.save(tmp_path / "happy.safetensors")
    loaded = VectorProfile.load(tmp_path / "happy.safetensors")
    assert (loaded.digest, loaded.header) == (digest, header)
    np.testing.assert_array_equal(loaded.artifacts[2].directions[0], direction(2))


def test_layer_0_and_a_missing_hint_are_no_obstacle(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"direction.0": direction(0)}, hint=None)
    found = read_vectors(path)
    assert list(found.directions) == [0]
    assert found.facts == {}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"direction.-1": direction(1)}, "unknown tensor 'direction.-1'"),
        ({"direction.01": direction(1)}, "unknown tensor"),
        ({"direction.1": direction(1), "scale": direction(1)}, "unknown tensor 'scale'"),
        ({"direction.1": direction(1).astype(np.float16)}, r"direction.1 is F16 \[8\]"),
        ({"direction.1": direction(1)[None]}, r"direction.1 is F32 \[1, 8\]"),
    ],
)
def test_tensors_that_are_no_directions(
    tensors: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        read_vectors(write_gguf(tmp_path / "v.gguf", tensors))


def test_a_gguf_of_something_else(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {"direction.1": direction(1)}, "llama")
    with pytest.raises(ValueError, match="architecture 'llama'; control vectors have"):
        read_vectors(path)


def test_damaged_gguf_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "v.gguf", {"direction.1": direction(1)}).read_bytes()
    end = whole.index(direction(1).tobytes()) + direction(1).nbytes
    cut = tmp_path / "cut.gguf"
    for size in range(4, end, 3):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cannot be read as GGUF"):
            read_vectors(cut)


def test_counts_larger_than_the_file_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 8 + b"\x01" + b"\x00" * 7)
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        read_vectors(path)


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "v.gguf", {"direction.1": direction(1)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"headway\[models\]"):
        read_vectors(path)


# Vectors of steering-vectors

ACTIVATIONS = {2: torch.from_numpy(direction(2)), 0: torch.from_numpy(direction(0))}


@pytest.mark.parametrize(
    "saved",
    [
        ACTIVATIONS,
        {"layer_activations": ACTIVATIONS},
        {"layer_activations": ACTIVATIONS, "layer_type": "decoder_block"},
    ],
)
@pytest.mark.parametrize("new_zip", [True, False])
def test_plain_tensors_become_a_profile(saved: Any, new_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=new_zip)
    found = read_vectors(path)
    assert found.source_format == "steering-vectors"
    profile = make_profile(found, GEOMETRY)
    assert profile.header.layers == (0, 2)
    assert profile.header.training == {
        "source_format": "steering-vectors",
        "layer_type": "decoder_block",
    }
    np.testing.assert_array_equal(profile.tensors["directions"][1, 0], direction(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_point_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    trained = torch.nn.Parameter(ACTIVATIONS[2].to(dtype))
    found = read_vectors(write_pt(tmp_path / "v.pt", {2: trained}))
    assert found.directions[2].dtype == np.float32
    np.testing.assert_array_equal(found.directions[2], direction(2))


@dataclass
class SteeringVector:
    """As the library's."""

    layer_activations: dict[int, torch.Tensor] = field(default_factory=dict)
    layer_type: str = "decoder_block"


def test_a_pickled_dataclass_is_refused_with_the_way_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_pt(tmp_path / "vector.pt", SteeringVector(ACTIVATIONS))
    with pytest.raises(ValueError, match="SteeringVector") as refused:
        read_vectors(path)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    exec("\n".join(lines), {"torch": torch})  # the advice works
    found = read_vectors(tmp_path / "new.pt")
    assert sorted(found.directions) == [0, 2]


class Malicious:
    """Creates the file `ran` when it is unpickled by the usual means."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_never_runs(form: str, inside: bool, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "v.pt"
    evil = Malicious(mark)
    saved = {"layer_activations": ACTIVATIONS, "layer_type": evil} if inside else evil
    if form == "pickle":
        path.write_bytes(pickle.dumps(saved))
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="can run any code"):
        read_vectors(path)
    assert not mark.exists()
    if form == "pickle":  # it would have
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([ACTIVATIONS[0]], "holds a list; expected a dict"),
        (ACTIVATIONS[0], "holds a Tensor; expected a dict"),
        ({"layer_activations": [ACTIVATIONS[0]]}, "must be a dict of layer -> tensor"),
        ({"layer_activations": ACTIVATIONS, "multiplier": 2.0}, "unknown key 'multiplier'"),
        ({"layer_activations": ACTIVATIONS, "layer_type": "mlp"}, "layer type 'mlp'"),
        ({"layer_activations": ACTIVATIONS, "layer_type": "self_attn"}, "layer type 'self_attn'"),
        ({"layer_activations": ACTIVATIONS, "layer_type": None}, "layer type None"),
        ({-1: ACTIVATIONS[0]}, "layer -1 counts from the end"),
        ({"2": ACTIVATIONS[0]}, "layers must be integers, got '2'"),
        ({True: ACTIVATIONS[0]}, "layers must be integers, got True"),
        ({"model.norm.weight": ACTIVATIONS[0]}, "layers must be integers"),
        ({1: [1.0, 2.0]}, "layer 1 has a list; expected a tensor"),
        ({1: torch.ones(HIDDEN, dtype=torch.int64)}, r"layer 1 has int64 \[8\]"),
        ({1: torch.ones(1, HIDDEN)}, r"layer 1 has float32 \[1, 8\]"),
        ({1: torch.ones(HIDDEN).to_sparse()}, "layer 1 has float32"),
        ({1: torch.ones(HIDDEN, device="meta")}, "layer 1 has float32"),
        ({1: torch.ones(1).expand(2**40)}, "more than the file stores"),
    ],
)
def test_other_contents_are_refused(saved: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read_vectors(write_pt(tmp_path / "v.pt", saved))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"x" * 100, b"\x80\x02"])
def test_a_damaged_file_of_pytorch(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a PyTorch file"):
        read_vectors(path, "steering-vectors")


# All formats


def test_the_format_is_told_by_the_first_bytes_or_given(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "v.pt", {"direction.1": direction(1)})
    assert detect(path) == "repeng"
    assert detect(write_pt(tmp_path / "v.gguf", ACTIVATIONS)) == "steering-vectors"
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        read_vectors(tmp_path / "v.gguf", "repeng")
    (tmp_path / "v.txt").write_text("text")
    with pytest.raises(ValueError, match="there are importers for: repeng, steering-vectors"):
        read_vectors(tmp_path / "v.txt")


def test_files_as_large_as_models_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    with path.open("wb") as file:
        file.truncate(MAX_VECTORS_BYTES + 1)
    with pytest.raises(ValueError, match=f"has {MAX_VECTORS_BYTES + 1} bytes; at most"):
        read_vectors(path)


@pytest.mark.parametrize(
    ("directions", "words"),
    [
        ({}, "holds no direction"),
        ({4: direction(4)}, "for layer 4, the model has the layers 0 .. 3"),
        ({-1: direction(1)}, "for layer -1, the model has the layers 0 .. 3"),
        (
            {1: direction(1)[:6]},
            r"layer 1 has the shape \[6\], the model's hidden size is 8",
        ),
        ({1: direction(1), 2: direction(2) * np.inf}, "layer 2 holds values that are not finite"),
    ],
)
def test_directions_that_do_not_fit_the_model(
    directions: dict[int, np.ndarray], words: str
) -> None:
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ValueError, match=words),
    ):
        make_profile(ImportedVectors("repeng", directions), GEOMETRY)


def test_the_command_line_alone_imports_importers() -> None:
    """No server reads the files of other libraries."""
    server = Path(importers.__file__).parents[1]
    users = {
        str(path.relative_to(server))
        for path in server.rglob("*.py")
        if "headway.server.importers" in path.read_text() and path.parent.name != "importers"
    }
    assert users == {"commands/profile.py"}
