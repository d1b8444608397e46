"""Sink dimensions: in which dimensions of the residual stream a model's attention sinks stand out.

A token is a sink of a layer if phi = max over the dimensions d of |x[d]| / RMS(x) >= tau, with x
the residual stream entering the layer and RMS(x) = sqrt(mean x^2) (VAR, arXiv 2503.03321). The
dimensions come from a model's training: they are known for a few families and measured for others
(`headway calibrate sinks`), whose profiles are read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.profiles import Count, Index, Profile, check_ascending
from headway.steering.validation import StrictModel

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


class SinkProfile(Profile):
    """What `headway calibrate sinks` found for one model.

    dims: ascending. measurements: one per dimension, in the order of `dims`, over `num_tokens`
    tokens of `num_prompts` prompts; `sink_tokens` of them reach `tau` in any of the dimensions.
    """

    kind: Literal["sinks"]
    dims: Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_DIMS)]
    tau: Annotated[float, Field(gt=0)]
    num_prompts: Count
    num_tokens: Count
    sink_tokens: Count
    measurements: tuple[DimMeasurement, ...]

    def check_shapes(self, param: str) -> None:
        """Raise SteeringError(E_BAD_PARAM) where the parts of the profile do not fit together."""
        check_ascending(self.dims, self.hidden_size, "dimension", f"{param}.dims")
        where = f"{param}.measurements"
        if tuple(measured.dim for measured in self.measurements) != self.dims:
            message = "there must be one measurement per dimension, in order"
            raise SteeringError(Reason.BAD_PARAM, message, where)
        for index, measured in enumerate(self.measurements):
            for key in ("phi_first", "phi_other"):
                length = len(getattr(measured, key))
                if length != self.num_layers:
                    message = f"has {length} values; the model has {self.num_layers} layers"
                    raise SteeringError(Reason.BAD_PARAM, message, f"{where}[{index}].{key}")
