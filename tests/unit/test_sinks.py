"""Sink dimensions: the built-in table, profile files, and how a server comes by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headway.server.engine.geometry import check_profiles, facts_of, geometry_of
from headway.steering import ModelGeometry, SteeringError
from headway.steering.heads import HeadProfile
from headway.steering.sinks import DimMeasurement, ModelFacts, SinkProfile, known_sink_dims

pytestmark = pytest.mark.unit

LLAMA_2_7B = ModelFacts("llama", "llama", 4096, 32, 32, 32000, 10000.0, 4096)
LLAMA_2_13B = replace(LLAMA_2_7B, hidden_size=5120, num_layers=40, num_kv_heads=40)
LLAVA_7B = replace(LLAMA_2_7B, model_type="llava", vocab_size=32064)
QWEN2_VL_7B = ModelFacts("qwen2_vl", "qwen2_vl_text", 3584, 28, 4, 152064, 1e6, 32768)
INTERNVL2_8B = ModelFacts("internvl_chat", "internlm2", 4096, 32, 8, 92553, 1e6, 32768)

GEOMETRY = ModelGeometry(4, 4, 2, 16, 64, architecture="LlamaForCausalLM")


@pytest.mark.parametrize(
    ("facts", "dims"),
    [
        (LLAMA_2_7B, (1415, 2533)),
        (LLAVA_7B, (1415, 2533)),
        (LLAMA_2_13B, (2100, 4743)),
        (replace(LLAMA_2_13B, model_type="llava", vocab_size=32064), (2100, 4743)),
        (QWEN2_VL_7B, (458, 2570)),
        (replace(QWEN2_VL_7B, text_model_type="qwen2_vl"), (458, 2570)),
        (INTERNVL2_8B, (3584,)),
    ],
)
def test_published_dimensions(facts: ModelFacts, dims: tuple[int, ...]) -> None:
    assert known_sink_dims(facts) == dims


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param(replace(LLAMA_2_7B, max_position_embeddings=2048), id="LLaMA-1-7B"),
        pytest.param(replace(LLAMA_2_7B, vocab_size=32016, rope_theta=1e6), id="CodeLlama-7B"),
        pytest.param(
            replace(LLAMA_2_7B, num_kv_heads=8, vocab_size=128256, rope_theta=5e5), id="LLaMA-3-8B"
        ),
        pytest.param(
            replace(LLAMA_2_7B, model_type="mistral", text_model_type="mistral", num_kv_heads=8),
            id="Mistral-7B",
        ),
        pytest.param(replace(LLAMA_2_7B, num_kv_heads=8), id="Mistral-7B as llama"),
        pytest.param(
            replace(LLAVA_7B, text_model_type="mistral", num_kv_heads=8), id="LLaVA on Mistral"
        ),
        pytest.param(replace(LLAMA_2_7B, num_layers=30, vocab_size=102400), id="DeepSeek-7B"),
        pytest.param(
            replace(QWEN2_VL_7B, hidden_size=1536, num_kv_heads=2, vocab_size=151936), id="Qwen2-2B"
        ),
        pytest.param(
            replace(QWEN2_VL_7B, model_type="qwen2_5_vl", text_model_type="qwen2_5_vl_text"),
            id="Qwen2.5-VL-7B",
        ),
        pytest.param(
            replace(INTERNVL2_8B, text_model_type="qwen2", hidden_size=3584, num_layers=28),
            id="InternVL3-8B",
        ),
        pytest.param(replace(INTERNVL2_8B, model_type="internlm2"), id="InternLM2-7B"),
    ],
)
def test_models_of_similar_sizes_are_not_taken_for_them(facts: ModelFacts) -> None:
    assert known_sink_dims(facts) is None


# Profiles


def make(geometry: ModelGeometry = GEOMETRY) -> SinkProfile:
    return SinkProfile(
        kind="sinks",
        version=1,
        fingerprint=geometry.fingerprint,
        architecture=geometry.architecture,
        hidden_size=geometry.hidden_size,
        num_layers=geometry.num_layers,
        dims=(5, 40),
        tau=20.0,
        num_prompts=2,
        num_tokens=9,
        sink_tokens=2,
        measurements=tuple(
            DimMeasurement(
                dim=dim, phi_first=(1.0, 5.5, 5.5, 2.0), phi_other=(0.5,) * 4, sink_tokens=2
            )
            for dim in (5, 40)
        ),
    )


def write(folder: Path, name: str = "sinks.json", **changes: Any) -> Path:
    """A profile file with some keys replaced, or dropped where the new value is `...`."""
    content = {**make().model_dump(mode="json"), **changes}
    content = {key: value for key, value in content.items() if value is not ...}
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def measurement(dim: int, **changes: Any) -> dict[str, Any]:
    [first, *_] = make().model_dump(mode="json")["measurements"]
    return {**first, "dim": dim, **changes}


def test_a_profile_survives_being_saved(tmp_path: Path) -> None:
    path = tmp_path / "sinks.json"
    make().save(path)
    assert SinkProfile.load(path) == make()
    assert list(json.loads(path.read_text()))[:2] == ["kind", "version"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"kind": "heads"}, "profile.kind", "sinks"),
        ({"kind": ...}, "profile.kind", "required"),
        ({"version": 2}, "profile.version", "1"),
        ({"colour": 1}, "profile.colour", "unknown key"),
        ({"fingerprint": "abc"}, "profile.fingerprint", "pattern"),
        ({"dims": []}, "profile.dims", "at least 1"),
        ({"dims": [5, "40"]}, "profile.dims[1]", "integer"),
        ({"dims": [5, 64]}, "profile.dims[1]", "0 .. 63"),
        ({"dims": [40, 5]}, "profile.dims[1]", "ascend"),
        ({"dims": [5, 5]}, "profile.dims[1]", "ascend"),
        ({"dims": [5, 41]}, "profile.measurements", "one measurement per dimension"),
        ({"tau": 0}, "profile.tau", "greater than 0"),
        ({"tau": float("nan")}, "profile.tau", "finite"),
        ({"measurements": ...}, "profile.measurements", "required"),
        (
            {"measurements": [measurement(5), measurement(40, phi_other=[1.0])]},
            "profile.measurements[1].phi_other",
            "1 values; the model has 4 layers",
        ),
        (
            {"measurements": [measurement(5, phi_first=[1.0, -1.0, 1.0, 1.0]), measurement(40)]},
            "profile.measurements[0].phi_first[1]",
            "-1.0",
        ),
    ],
)
def test_a_malformed_profile_names_the_key(
    tmp_path: Path, changes: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(SteeringError) as caught:
        SinkProfile.load(write(tmp_path, **changes))
    assert (caught.value.reason, caught.value.param) == ("E_BAD_PARAM", param)
    assert words in caught.value.message


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", None])
def test_a_file_that_is_no_json(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "sinks.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SteeringError, match="cannot be read") as caught:
        SinkProfile.load(path, "here")
    assert (caught.value.reason, caught.value.param) == ("E_BAD_PARAM", "here")


def test_a_profile_is_for_one_model() -> None:
    make().check_model(GEOMETRY)
    with pytest.raises(SteeringError, match="4 layers .* 5 layers") as caught:
        make().check_model(replace(GEOMETRY, num_layers=5))
    assert caught.value.reason == "E_PROFILE_MISMATCH"


def test_what_a_profile_adds_does_not_change_the_fingerprint_it_names() -> None:
    assert replace(GEOMETRY, sink_dims=(5, 40)).fingerprint == GEOMETRY.fingerprint
    assert replace(GEOMETRY, hidden_size=65).fingerprint != GEOMETRY.fingerprint


# In the server


def engine(facts: ModelFacts | None = None, **profiles: Any) -> SimpleNamespace:
    """vLLM's configuration of a model of GEOMETRY, or of the sizes in `facts`."""
    known = facts or ModelFacts("llama", "llama", 64, 4, 2, 1000, 10000.0, 512)
    text = SimpleNamespace(
        model_type=known.text_model_type,
        vocab_size=known.vocab_size,
        rope_parameters={"rope_theta": known.rope_theta, "rope_type": "default"},
        max_position_embeddings=known.max_position_embeddings,
    )
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: known.num_layers,
        model_arch_config=SimpleNamespace(total_num_attention_heads=4),
        get_total_num_kv_heads=lambda: known.num_kv_heads,
        get_head_size=lambda: 16,
        get_hidden_size=lambda: known.hidden_size,
        is_multimodal_model=False,
        quantization=None,
        architecture="LlamaForCausalLM",
        hf_config=SimpleNamespace(model_type=known.model_type),
        hf_text_config=text,
    )
    paths = {name: str(path) if isinstance(path, Path) else path for name, path in profiles.items()}
    settings = {"profiles": paths} if paths else {}
    return SimpleNamespace(model_config=model, additional_config={"headway": settings})


def test_the_dimensions_come_from_the_profile(tmp_path: Path) -> None:
    config = engine(mine=write(tmp_path))
    check_profiles(config)
    assert geometry_of(config) == replace(GEOMETRY, sink_dims=(5, 40))


def test_head_profiles_stand_beside_it(tmp_path: Path) -> None:
    profile = HeadProfile.of(
        GEOMETRY,
        num_heads=4,
        heads=((1, 0),),
        layers=(1,),
        alpha=2.0,
        num_images=1,
        questions=("What is this?",),
        vhd=((1.0, 0.0, 0.0, 0.0),) * 4,
    )
    profile.save(tmp_path / "heads.json")
    config = engine(mine=write(tmp_path), seen=tmp_path / "heads.json")
    found = geometry_of(config)
    assert found == replace(GEOMETRY, sink_dims=(5, 40))
    assert found.profiles.names() == ("mine", "seen")
    assert found.profiles.find("seen").profile == profile


def test_else_from_the_table_else_there_are_none(tmp_path: Path) -> None:
    assert geometry_of(engine()) == GEOMETRY
    assert geometry_of(engine(LLAVA_7B)).sink_dims == (1415, 2533)
    geometry = replace(geometry_of(engine(LLAVA_7B)), sink_dims=())
    path = write(
        tmp_path,
        fingerprint=geometry.fingerprint,
        num_layers=32,
        hidden_size=4096,
        dims=[7],
        measurements=[measurement(7, phi_first=[1.0] * 32, phi_other=[1.0] * 32)],
    )
    assert geometry_of(engine(LLAVA_7B, mine=path)).sink_dims == (7,)


def test_facts_are_read_from_the_configuration() -> None:
    config = engine(QWEN2_VL_7B)
    assert facts_of(config.model_config, geometry_of(config)) == QWEN2_VL_7B
    text = config.model_config.hf_text_config
    text.rope_parameters = None  # as before transformers 5
    text.rope_theta = 5.0
    assert facts_of(config.model_config, geometry_of(config)).rope_theta == 5.0


def test_a_profile_is_read_once_per_process(tmp_path: Path) -> None:
    path = write(tmp_path)
    geometry_of(engine(mine=path))
    path.unlink()
    assert geometry_of(engine(mine=path)).sink_dims == (5, 40)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tau": "high"}, r"steering profile mine \(.*sinks.json\): profile.tau: "),
        ({"fingerprint": "0" * 16}, "steering profile mine .*: profile: made for another model"),
    ],
)
def test_a_bad_profile_ends_the_start(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_profiles(engine(mine=write(tmp_path, **changes)))


def test_two_sinks_profiles_end_the_start(tmp_path: Path) -> None:
    paths = {name: write(tmp_path, f"{name}.json") for name in ("one", "two")}
    with pytest.raises(ValueError, match="one profile of the kind sinks.*one, two"):
        check_profiles(engine(**paths))


@pytest.mark.parametrize("profiles", [{"a:b": "x.json"}, {"a": 1}])
def test_names_and_paths_are_validated(profiles: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"headway.profiles.{next(iter(profiles))}"):
        check_profiles(engine(**profiles))


def test_without_headway_there_are_no_profiles() -> None:
    config = engine(mine="/no/such/file")
    config.additional_config = {}
    check_profiles(config)
    assert geometry_of(config) == GEOMETRY
