"""Whether Headway is on for an engine: `additional_config={"headway": {...}}`.

vLLM symbols relied on: `VllmConfig.additional_config`, `ModelConfig` predicates,
`ModelArchitectureConfig.per_layer_overrides`, `CacheConfig.cache_dtype` and `block_size`,
`vllm.v1.attention.backends.cpu_attn._get_attn_isa`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from headway.kernels.segment_attention import BLOCK_MULTIPLE, DTYPES, library_path
from headway.steering import Reason, SteeringError, SteeringProgram
from headway.steering.program import Feature, ResidualEdit, ResidualSite

KEY = "headway"


def is_enabled(vllm_config: Any) -> bool:
    """Whether this engine was started with Headway."""
    extra = vllm_config.additional_config
    return isinstance(extra, dict) and isinstance(extra.get(KEY), dict)


def unsupported_model(vllm_config: Any) -> str | None:
    """Why the model of this engine cannot be steered at all, or None if it can."""
    model = vllm_config.model_config
    if model.runner_type != "generate":
        return f"it is served for {model.runner_type}, not for generation"
    if model.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    if model.is_attention_free or model.is_hybrid:
        return "models with layers other than attention are not supported"
    if model.use_mla:
        return "multi-head latent attention is not supported"
    varying = {
        name for layer in model.model_arch_config.per_layer_overrides or () for name in layer
    }
    if varying & {"total_num_attention_heads", "head_size"}:
        return "models whose layers differ in their heads are not supported"
    return None


def unsupported_request(vllm_config: Any) -> str | None:
    """Why no request of this engine can be steered, or None; unsteered ones are served."""
    if vllm_config.speculative_config is not None:
        return "steering together with speculative decoding is not supported"
    parallel = vllm_config.parallel_config
    # A dry run describes no more than it must.
    sizes = ("decode_context_parallel_size", "prefill_context_parallel_size")
    if any(getattr(parallel, name, 1) > 1 for name in sizes):
        return "steering together with context parallelism is not supported"
    if getattr(parallel, "use_ubatching", False):
        return "steering together with dual batch overlap is not supported"
    if getattr(getattr(vllm_config, "cache_config", None), "kv_sharing_fast_prefill", False):
        return "steering together with fast prefill of layers that share keys is not supported"
    return None


def unsupported_attention(vllm_config: Any) -> str | None:
    """Why attention weights cannot be edited in this engine, or None if they can."""
    model, cache = vllm_config.model_config, getattr(vllm_config, "cache_config", None)
    on_gpu = uses_gpu_runner(vllm_config)
    if not on_gpu and library_path() is None:
        return "the attention kernel was not built; install Headway where there is a C compiler"
    if cache is None:
        return None  # a dry run without an engine, which knows the model only
    dtypes = GPU_DTYPES if on_gpu else DTYPES
    if model.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the attention kernel takes {known}, not {model.dtype}"
    if reason := _converted_cache(model, cache, "the attention kernel"):
        return reason
    if not on_gpu and (reason := _unsupported_cpu_cache(model, cache)):
        return reason
    kind = _other_attention(model)
    return f"{kind} is not supported" if kind else None


def _other_attention(model: Any) -> str | None:
    """What makes a model's attention another one than the head word's formula describes."""
    text = model.hf_text_config
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", "") == "alibi":
        return "attention with ALiBi"
    if getattr(text, "model_type", "") in MODELS_WITH_SINK_LOGITS:
        return "attention with learned sinks"
    if getattr(text, "attention_chunk_size", None):
        return "chunked local attention"
    if getattr(model, "is_mm_prefix_lm", False):
        return "attention in which the tokens of an image see each other"
    if getattr(model, "rswa_window", None) is not None:
        return "attention with a window that leaves out a prefix"
    return None


def uses_gpu_runner(vllm_config: Any) -> bool:
    """Whether this engine runs vLLM's V2 runner, with the Triton kernels behind it."""
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def _unsupported_cpu_cache(model: Any, cache: Any) -> str | None:
    if cache.block_size % BLOCK_MULTIPLE:
        return f"the KV cache's block size must be a multiple of {BLOCK_MULTIPLE}"
    reason = _packed_cache(model, cache, "the attention kernel")
    if reason and cache_layout(torch.float32, cache.block_size, model.get_head_size()) == "vec":
        reason += "; --dtype float32 has the layout it reads"
    return reason


def _converted_cache(model: Any, cache: Any, reader: str) -> str | None:
    if cache.cache_dtype in ("auto", str(model.dtype).removeprefix("torch.")):
        return None
    return f"{reader} does not read a KV cache of {cache.cache_dtype}"


def _packed_cache(model: Any, cache: Any, reader: str) -> str | None:
    head_size = model.get_head_size()
    layout = cache_layout(model.dtype, cache.block_size, head_size)
    if layout == "vec":  # keys by dimension, values by position, neither packed
        return None
    return (
        f"on this processor vLLM lays a {model.dtype} KV cache with heads of {head_size} out as "
        f"`{layout}`, which {reader} does not read"
    )


RESIDUAL_EDITS = "residual_edits"
AFTER_ATTENTION = "after_attention"


def captures_residual(vllm_config: Any) -> bool:
    """Whether CUDA graphs hold residual edits: `{"headway": {"residual_edits": true}}`.

    They cost a launch a layer in every step, also where nobody asks for them.
    """
    return bool(vllm_config.additional_config[KEY].get(RESIDUAL_EDITS, False))


def edits_after_attention(vllm_config: Any) -> bool:
    """Whether the stream can be edited between attention and MLP.

    A compiled model has a call for it in every layer, used or not, so that there it must be asked
    for: `{"headway": {"residual_edits": "after_attention"}}`.
    """
    asked = vllm_config.additional_config[KEY].get(RESIDUAL_EDITS) == AFTER_ATTENTION
    return asked or bool(vllm_config.model_config.enforce_eager)


def unsupported_residual(vllm_config: Any, edits: Sequence[ResidualEdit] = ()) -> str | None:
    """Why this engine cannot edit the residual stream, or not so, or None if it can."""
    model = vllm_config.model_config
    inside = any(edit.site is ResidualSite.AFTER_ATTENTION for edit in edits)
    text = getattr(model.hf_text_config, "model_type", "") if edits else ""
    end = 2 * model.get_total_num_hidden_layers() if edits else 0
    if edits and text not in KNOWN_LAYERS and (inside or any(edit.point == end for edit in edits)):
        return (
            "edits after attention and behind the last layer need to know where norms stand, which "
            f"Headway does not for {text}; edit the output of another layer"
        )
    # A dry run without an engine has no compilation.
    compilation = getattr(vllm_config, "compilation_config", None)
    graphs = compilation is not None and bool(compilation.cudagraph_mode)
    if uses_gpu_runner(vllm_config) and graphs and not captures_residual(vllm_config):
        return 'CUDA graphs were captured without {"headway": {"residual_edits": true}}'
    if inside and compilation is not None and not edits_after_attention(vllm_config):
        setting = '{"headway": {"residual_edits": "after_attention"}}'
        return f"edits after attention in a compiled model need the setting {setting}"
    return None


def unsupported_feedback(vllm_config: Any) -> str | None:
    """Why nothing is kept of what probes read in this engine, or None if it is."""
    if uses_gpu_runner(vllm_config):
        return "feedback is not there yet on vLLM's V2 runner and on GPU, where no probe is read"
    return None


VECTOR_MEMORY = "max_vector_memory"
DEFAULT_VECTOR_MEMORY = 512


def max_vector_bytes(vllm_config: Any) -> int:
    """How much memory of each worker the vectors of profiles may take that came over HTTP.

    The setting `{"headway": {"max_vector_memory": MIB}}`. Raises ValueError if it is no number.
    """
    return _limit(vllm_config, VECTOR_MEMORY, DEFAULT_VECTOR_MEMORY, "of MiB") * 1024 * 1024


def _limit(vllm_config: Any, name: str, default: int, what: str) -> int:
    """A setting that is a number, and not below 0. Raises ValueError if it is none."""
    settings = (getattr(vllm_config, "additional_config", None) or {}).get(KEY) or {}
    number = settings.get(name, default)
    if type(number) is not int or number < 0:
        raise ValueError(f"{KEY}.{name} must be a whole number {what}: {number!r}")
    return number


SGRS_REQUESTS = "max_sgrs_requests"
DEFAULT_SGRS_REQUESTS = 8

KNOWN_LAYERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "gemma3_text",
    "qwen2_vl",
    "qwen2_vl_text",
    "qwen2_5_vl",
    "qwen2_5_vl_text",
)
"""`model_type` of the text models of whose layers it is known what stands where, and how to go
back through them."""


def max_sgrs_requests(vllm_config: Any) -> int:
    """How many requests may have the saliency of their tokens computed at a time; 0 for none.

    The setting `{"headway": {"max_sgrs_requests": N}}`. Raises ValueError if it is no such number.
    """
    return _limit(vllm_config, SGRS_REQUESTS, DEFAULT_SGRS_REQUESTS, "of at least 0")


def unsupported_saliency(vllm_config: Any) -> tuple[Reason, str] | None:
    """Why saliencies of candidates cannot be computed in this engine, or None if they can."""
    if max_sgrs_requests(vllm_config) == 0:
        return Reason.UNSUPPORTED, "SGRS was switched off (--max-sgrs-requests 0)"
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    if any(getattr(parallel, name, 1) > 1 for name in sizes):
        message = "SGRS needs one rank, which has the whole model; this engine splits it"
        return Reason.UNSUPPORTED, message
    if model.quantization is not None:
        message = f"SGRS needs weights that are not quantised; these are: {model.quantization}"
        return Reason.QUANTIZED, message
    if uses_gpu_runner(vllm_config):
        return Reason.UNSUPPORTED, "SGRS is not there yet on vLLM's V2 runner and on GPU"
    if getattr(vllm_config, "lora_config", None) is not None:
        return Reason.UNSUPPORTED, "SGRS in an engine with LoRA adapters is not supported"
    text = getattr(model.hf_text_config, "model_type", "")
    if getattr(model.hf_text_config, "llama_4_scaling", None) is not None:
        return Reason.UNSUPPORTED, f"SGRS does not know the queries of {text} with llama_4_scaling"
    if text not in KNOWN_LAYERS:
        known = ", ".join(KNOWN_LAYERS)
        message = (
            f"SGRS does not know the layers of {text} ({model.architecture}); it knows: {known}"
        )
        return Reason.UNSUPPORTED, message
    cache = getattr(vllm_config, "cache_config", None)
    if cache is None:
        return None
    # The gate computes attention once more, from keys and values in the cache.
    unread = _converted_cache(model, cache, "SGRS") or _packed_cache(model, cache, "SGRS")
    return (Reason.UNSUPPORTED, unread) if unread else None


GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MODELS_WITH_SINK_LOGITS = ("gpt_oss",)
"""Their softmax has a further, learned logit, which the head word does not describe."""


def cache_layout(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """vLLM's name for the layout of its CPU cache here."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    layout: str = _get_attn_isa(dtype, block_size, head_size, "auto")
    return layout


def refuse_unsupported(program: SteeringProgram, vllm_config: Any, param: str = "steering") -> None:
    """Raise SteeringError for a program that this engine cannot carry out.

    E_UNSUPPORTED, or E_QUANTIZED where the weights are what stands against it.
    """
    reasons: dict[Feature, Callable[[Any], str | None]] = {
        Feature.ATTENTION_EDIT: unsupported_attention,
        Feature.RESIDUAL_EDIT: partial(unsupported_residual, edits=program.residual_edits),
    }
    for feature, reason_of in reasons.items():
        if feature in program.features and (reason := reason_of(vllm_config)):
            raise SteeringError(Reason.UNSUPPORTED, reason, param)
    if program.saliency is not None and program.residual_edits:
        message = "SGRS does not go back through edits of the residual stream"
        raise SteeringError(Reason.UNSUPPORTED, message, param)
    if program.saliency is not None and (refusal := unsupported_saliency(vllm_config)):
        raise SteeringError(*refusal, param)
