"""Whether Headway is on for an engine: `additional_config={"headway": {...}}`.

vLLM symbols relied on: `VllmConfig.additional_config`, `ModelConfig` predicates,
`ModelArchitectureConfig.per_layer_overrides`.
"""

from __future__ import annotations

from typing import Any

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
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        return "steering together with context parallelism is not supported"
    return None
