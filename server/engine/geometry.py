"""What steering needs to know of the served model, from vLLM's configuration and from profiles.

Profiles are the setting `additional_config={"headway": {"profiles": {name: path}}}`.

vLLM symbols relied on: `ModelConfig.get_total_num_hidden_layers`, `get_total_num_kv_heads`,
`get_head_size`, `get_hidden_size`, `model_arch_config`, `is_multimodal_model`, `quantization`,
`hf_config`, `hf_text_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from headway.server.engine.config import KEY, is_enabled
from headway.steering import ModelGeometry, Reason, SteeringError
from headway.steering.heads import HeadProfile
from headway.steering.profiles import AnyProfile, NamedProfiles, Profile, read_json
from headway.steering.schema import PresetName
from headway.steering.sinks import ModelFacts, SinkProfile, known_sink_dims
from headway.steering.vectors import VectorProfile

PROFILES = "profiles"
"""The setting of Headway that names profile files."""

KINDS: dict[str, type[Profile]] = {"sinks": SinkProfile, "heads": HeadProfile}
"""The `kind` of a JSON profile -> what it is read as."""

VECTORS_SUFFIX = ".safetensors"
"""Ends the name of a file that holds a vector profile; other profiles are JSON."""

_PATHS: TypeAdapter[dict[str, str]] = TypeAdapter(dict[PresetName, str])


def geometry_of(vllm_config: Any) -> ModelGeometry:
    """Sizes of the whole model, whatever the parallelism it is served with, and its profiles.

    The sink dimensions are those of the sinks profile, else those known for the model, else ().
    Raises ValueError as `check_profiles` does.
    """
    model = vllm_config.model_config
    geometry = ModelGeometry(
        num_layers=model.get_total_num_hidden_layers(),
        num_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        hidden_size=model.get_hidden_size(),
        supports_images=bool(model.is_multimodal_model),
        quantized=model.quantization is not None,
        architecture=str(model.architecture),
    )
    profiles = load_profiles(profile_paths(vllm_config), geometry)
    sinks = sink_profile(profiles)
    dims = sinks.dims if sinks else known_sink_dims(facts_of(model, geometry))
    return replace(geometry, sink_dims=dims or (), profiles=NamedProfiles(profiles))


def check_profiles(vllm_config: Any) -> None:
    """Raise ValueError for a profile that is unreadable or of another model, or two of sinks."""
    if profile_paths(vllm_config):
        geometry_of(vllm_config)


def profile_paths(vllm_config: Any) -> dict[str, str]:
    """Profile name -> path, as the engine was started with. Raises ValueError."""
    if not is_enabled(vllm_config):
        return {}
    try:
        return _PATHS.validate_python(vllm_config.additional_config[KEY].get(PROFILES) or {})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, (KEY, PROFILES, *problem["loc"])))
        message = f"additional_config {where}: {problem['msg']}; it maps names to paths"
        raise ValueError(message) from None


def load_profiles(paths: Mapping[str, str], geometry: ModelGeometry) -> dict[str, AnyProfile]:
    """The named profile files, each checked against the model, in order of their names.

    Raises ValueError that names the profile.
    """
    profiles: dict[str, AnyProfile] = {}
    for name, path in sorted(paths.items()):
        try:
            profiles[name] = load_profile(path)
            profiles[name].check_model(geometry)
        except SteeringError as error:
            raise ValueError(f"steering profile {name} ({path}): {error}") from None
    return profiles


def sink_profile(profiles: Mapping[str, AnyProfile]) -> SinkProfile | None:
    """The sinks profile among them, None if there is none. Raises ValueError for several."""
    found = {name: each for name, each in profiles.items() if isinstance(each, SinkProfile)}
    if len(found) > 1:
        names = ", ".join(found)
        raise ValueError(f"a model has one profile of the kind sinks, these are several: {names}")
    return next(iter(found.values()), None)


@lru_cache
def load_profile(path: str) -> AnyProfile:
    """A profile file of any kind, read once per process. Raises SteeringError(E_BAD_PARAM)."""
    if path.endswith(VECTORS_SUFFIX):
        return VectorProfile.load(Path(path))
    return parse_profile(read_json(Path(path)))


def parse_profile(value: Any, param: str = "profile") -> Profile:
    """A profile that is JSON, of any kind. Raises SteeringError(E_BAD_PARAM)."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        message = f"must be one of {', '.join(KINDS)}, got {json.dumps(kind)}"
        raise SteeringError(Reason.BAD_PARAM, message, f"{param}.kind")
    return KINDS[kind].parse(value, param)


def facts_of(model_config: Any, geometry: ModelGeometry) -> ModelFacts:
    """What tells the family of the model."""
    text = model_config.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {}
    return ModelFacts(
        model_type=str(getattr(model_config.hf_config, "model_type", "")),
        text_model_type=str(getattr(text, "model_type", "")),
        hidden_size=geometry.hidden_size,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        vocab_size=int(getattr(text, "vocab_size", 0)),
        rope_theta=float(rope.get("rope_theta") or getattr(text, "rope_theta", 0) or 0),
        max_position_embeddings=int(getattr(text, "max_position_embeddings", 0) or 0),
    )
