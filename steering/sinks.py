"""Sink dimensions: in which dimensions of the residual stream a model's attention sinks stand out.

A token is a sink of a layer if phi = max over the dimensions d of |x[d]| / RMS(x) >= tau, with x
the residual stream entering the layer and RMS(x) = sqrt(mean x^2) (VAR, arXiv 2503.03321). The
dimensions come from a model's training: they are known for a few families and measured for others
(`headway calibrate sinks`), whose profiles are read here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.validation import StrictModel, validate

MAX_DIMS = 16
"""Most dimensions a profile may name."""

KNOWN_SINK_DIMS: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("llama-2", 4096, 32): (1415, 2533),
    ("llama-2", 5120, 40): (2100, 4743),
    ("qwen2-vl", 3584, 28): (458, 2570),
    ("internlm2-vl", 4096, 32): (3584,),
}
"""(family, hidden size, layers) -> dimensions, as VAR's authors give them."""


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says about its family.

    model_type: of the whole model ("llava"). text_model_type: of its language model ("llama").
    num_kv_heads: for the whole model. max_position_embeddings: as configured, before RoPE scaling.
    """

    model_type: str
    text_model_type: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float
    max_position_embeddings: int


def known_sink_dims(facts: ModelFacts) -> tuple[int, ...] | None:
    """The published sink dimensions of a model, None if there are none for it.

    Models fine-tuned from a family share its dimensions: LLaVA-1.5 has those of LLaMA-2, to which
    Vicuna 1.5 leads back.
    """
    return KNOWN_SINK_DIMS.get((_family(facts), facts.hidden_size, facts.num_layers))


def _family(facts: ModelFacts) -> str:
    if facts.model_type == "qwen2_vl":
        return "qwen2-vl"
    if facts.model_type == "internvl_chat" and facts.text_model_type == "internlm2":
        return "internlm2-vl"
    # Models of other training share sizes and code with LLaMA-2: LLaMA-3 and Mistral differ in
    # vocabulary or KV heads, Code Llama in its RoPE base, LLaMA-1 in its context.
    is_llama_2 = (
        facts.text_model_type == "llama"
        and 32000 <= facts.vocab_size <= 32064
        and facts.num_kv_heads * 128 == facts.hidden_size
        and facts.rope_theta == 10000
        and facts.max_position_embeddings >= 4096
    )
    return "llama-2" if is_llama_2 else ""


Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Phi = Annotated[float, Field(ge=0)]


class DimMeasurement(StrictModel):
    """|x[d]| / RMS(x) of one dimension d, layer by layer.

    phi_first: on the first token, mean over the prompts. phi_other: median over all other tokens.
    sink_tokens: how many tokens reach tau in it, in at least one layer.
    """

    dim: Index
    phi_first: tuple[Phi, ...]
    phi_other: tuple[Phi, ...]
    sink_tokens: Count


class SinkProfile(StrictModel):
    """What `headway calibrate sinks` found for one model.

    fingerprint: of its `ModelGeometry`. dims: ascending. measurements: one per dimension, in the
    order of `dims`, over `num_tokens` tokens of `num_prompts` prompts; `sink_tokens` of them reach
    `tau` in any of the dimensions.
    """

    kind: Literal["sinks"]
    version: Literal[1]
    fingerprint: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    architecture: str
    hidden_size: Annotated[int, Field(gt=0)]
    num_layers: Annotated[int, Field(gt=0)]
    dims: Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_DIMS)]
    tau: Annotated[float, Field(gt=0)]
    num_prompts: Count
    num_tokens: Count
    sink_tokens: Count
    measurements: tuple[DimMeasurement, ...]

    @classmethod
    def of(cls, geometry: ModelGeometry, **found: Any) -> SinkProfile:
        """A profile of the model of `geometry`; found: the fields from `dims` on."""
        return cls(
            kind="sinks",
            version=1,
            fingerprint=geometry.fingerprint,
            architecture=geometry.architecture,
            hidden_size=geometry.hidden_size,
            num_layers=geometry.num_layers,
            **found,
        )

    def save(self, path: Path) -> None:
        """Write the profile as JSON. Raises OSError."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, param: str = "profile") -> SinkProfile:
        """Read a profile. Raises SteeringError(E_BAD_PARAM) that names the key under `param`."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"cannot be read as JSON: {error}"
            raise SteeringError(Reason.BAD_PARAM, message, param) from None
        profile = validate(cls, value, param)
        _check_shapes(profile, param)
        return profile

    def check_model(self, geometry: ModelGeometry, param: str = "profile") -> None:
        """Raise SteeringError(E_PROFILE_MISMATCH) if it was made for a model of other sizes."""
        if self.fingerprint != geometry.fingerprint:
            made_for = _describe(self.architecture, self.num_layers, self.hidden_size)
            model = _describe(geometry.architecture, geometry.num_layers, geometry.hidden_size)
            message = (
                f"made for another model: {made_for}, fingerprint {self.fingerprint}; "
                f"this one is {model}, fingerprint {geometry.fingerprint}"
            )
            raise SteeringError(Reason.PROFILE_MISMATCH, message, param)


def _check_shapes(profile: SinkProfile, param: str) -> None:
    """Raise SteeringError(E_BAD_PARAM) where the parts of a profile do not fit together."""

    def refuse(message: str, where: str) -> SteeringError:
        return SteeringError(Reason.BAD_PARAM, message, f"{param}.{where}")

    for index, dim in enumerate(profile.dims):
        if dim >= profile.hidden_size:
            allowed = f"0 .. {profile.hidden_size - 1}"
            raise refuse(f"dimension {dim} does not exist; allowed: {allowed}", f"dims[{index}]")
        if index and dim <= profile.dims[index - 1]:
            raise refuse("the dimensions must ascend", f"dims[{index}]")
    if tuple(measured.dim for measured in profile.measurements) != profile.dims:
        raise refuse("there must be one measurement per dimension, in order", "measurements")
    for index, measured in enumerate(profile.measurements):
        for key in ("phi_first", "phi_other"):
            length = len(getattr(measured, key))
            if length != profile.num_layers:
                message = f"has {length} values; the model has {profile.num_layers} layers"
                raise refuse(message, f"measurements[{index}].{key}")


def _describe(architecture: str, num_layers: int, hidden_size: int) -> str:
    return f"{architecture} with {num_layers} layers and hidden size {hidden_size}"
