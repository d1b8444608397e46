"""Every vLLM symbol that Headway's engine relies on, and whether the installed vLLM has it.

A vLLM release that moves one of them is caught here, by name, before it can serve a request
unsteered. `headway doctor` prints the list; a contract test checks each entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

SUPPORTED = "0.32."
"""Prefix of the vLLM versions that Headway supports."""


@dataclass(frozen=True)
class Seam:
    """A symbol `module.path`; its parameters start with, or its fields include, `needs`."""

    module: str
    path: str
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Dotted name, as it appears in messages."""
        return f"{self.module}.{self.path}"


@dataclass(frozen=True)
class SeamCheck:
    """What the check of one seam found."""

    name: str
    ok: bool
    detail: str = ""


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_KV_MANAGER = "vllm.v1.core.kv_cache_manager"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"

SEAMS: tuple[Seam, ...] = (
    # plugin.py, config.py, geometry.py
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    Seam("vllm.config", "VllmConfig", ("additional_config", "speculative_config")),
    Seam("vllm.config", "ParallelConfig", ("worker_cls", "decode_context_parallel_size")),
    Seam("vllm.config", "SchedulerConfig", ("scheduler_cls", "max_num_seqs")),
    Seam("vllm.config", "SchedulerConfig.get_scheduler_cls", ("self",)),
    Seam("vllm.config", "ModelConfig.get_total_num_hidden_layers", ("self",)),
    Seam("vllm.config", "ModelConfig.get_layers_start_end_indices", ("self", "parallel_config")),
    Seam("vllm.config", "ModelConfig.get_total_num_kv_heads", ("self",)),
    Seam("vllm.config", "ModelConfig.get_head_size", ("self",)),
    Seam("vllm.config", "ModelConfig.get_hidden_size", ("self",)),
    Seam("vllm.config", "ModelConfig.is_multimodal_model"),
    Seam("vllm.config", "ModelConfig.is_encoder_decoder"),
    Seam("vllm.config", "ModelConfig.is_attention_free"),
    Seam("vllm.config", "ModelConfig.is_hybrid"),
    Seam("vllm.config", "ModelConfig.use_mla"),
    Seam(
        "vllm.config.model_arch",
        "ModelArchitectureConfig",
        ("total_num_attention_heads", "head_size", "per_layer_overrides"),
    ),
    # input_processor.py, request.py
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
    ),
    Seam(
        "vllm.v1.engine",
        "EngineCoreRequest",
        ("sampling_params", "prompt_token_ids", "prompt_embeds", "mm_features", "resumable"),
    ),
    Seam("vllm.v1.engine.input_processor", "InputProcessor.tokenizer"),
    Seam("vllm.renderers", "BaseRenderer.mm_processor_cache"),
    Seam(
        "vllm.multimodal.cache.base",
        "BaseMultiModalProcessorCache.invalidate",
        ("self", "mm_hash"),
    ),
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("self", "prompt", "sampling_params")),
    # prompt.py
    Seam("vllm.multimodal.inputs", "MultiModalFeatureSpec", ("modality", "mm_position")),
    Seam("vllm.multimodal.inputs", "PlaceholderRange", ("offset", "length", "is_embed")),
    # cache_key.py
    Seam(
        "vllm.v1.core.kv_cache_utils",
        "_gen_prompt_embeds_extra_hash_keys",
        ("request", "start_token_idx", "end_token_idx"),
    ),
    Seam("vllm", "SamplingParams", ("extra_args",)),
    Seam("vllm.exceptions", "VLLMClientError"),
    # scheduler.py
    Seam(
        _SCHEDULER,
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Seam("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
    Seam(_KV_MANAGER, "KVCacheManager.get_block_ids", ("self", "request_id")),
    Seam(_KV_MANAGER, "KVCacheManager.evict_blocks", ("self", "block_ids")),
    Seam(
        "vllm.v1.outputs",
        "ModelRunnerOutput",
        ("req_ids", "req_id_to_index", "sampled_token_ids"),
    ),
    # attention.py
    Seam(_CPU_ATTENTION, "CPUAttentionBackend.get_impl_cls"),
    Seam(
        _CPU_ATTENTION,
        "CPUAttentionBackendImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    Seam(
        "vllm.v1.attention.backends.registry",
        "register_backend",
        ("backend", "class_path"),
    ),
    Seam("vllm.v1.attention.backends.registry", "AttentionBackendEnum.CPU_ATTN"),
    Seam("vllm.v1.attention.backend", "AttentionType.DECODER"),
    Seam(
        _CPU_ATTENTION,
        "CPUAttentionMetadata",
        ("query_start_loc", "seq_lens", "block_table", "slot_mapping"),
    ),
    Seam(_CPU_ATTENTION, "_get_attn_isa", ("dtype", "block_size", "head_size", "kv_cache_dtype")),
    Seam("vllm.model_executor.models.utils", "extract_layer_index", ("layer_name",)),
    # layer_boundary.py
    Seam(
        "vllm.utils.torch_utils",
        "direct_register_custom_op",
        ("op_name", "op_func", "mutates_args", "fake_impl", "target_lib", "dispatch_key"),
    ),
    Seam("vllm.config", "CompilationConfig", ("static_forward_context",)),
    Seam(
        "vllm.model_executor.models.llama",
        "LlamaDecoderLayer.forward",
        ("self", "positions", "hidden_states", "residual"),
    ),
    # cpu_worker.py
    Seam("vllm.v1.worker.cpu_worker", "CPUModelRunner"),
    Seam("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ("self",)),
    Seam("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", ("self",)),
    Seam(_RUNNER, "GPUModelRunner._update_states", ("self", "scheduler_output")),
    Seam(
        _RUNNER,
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
    ),
    Seam(_RUNNER, "GPUModelRunner.execute_model", ("self", "scheduler_output")),
    Seam(_RUNNER, "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("scheduled_new_reqs", "finished_req_ids", "num_scheduled_tokens"),
    ),
    Seam("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params")),
    Seam("vllm.distributed", "get_tp_group"),
    # client.py
    Seam("vllm.v1.engine.core_client", "AsyncMPClient.call_utility_all_async", ("self", "method")),
    Seam("vllm.v1.engine.core", "EngineCore.collective_rpc", ("self", "method", "timeout", "args")),
)

ATTRIBUTES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        _SCHEDULER,
        "Scheduler",
        ("self.requests", "self.running", "self.kv_cache_manager", "encoder_cache_mismatch_reqs"),
    ),
    (_KV_MANAGER, "KVCacheManager", ("self.block_pool", "self.kv_cache_config")),
    ("vllm.v1.core.block_pool", "BlockPool", ("self.null_block",)),
    ("vllm.v1.request", "Request", ("self.num_computed_tokens", "self.num_in_flight_tokens")),
    (_RUNNER, "GPUModelRunner", ("self.input_batch", "self._update_states(", "_prepare_inputs(")),
    (
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch",
        ("def req_ids", "self.num_computed_tokens_cpu"),
    ),
    (
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        ("_gen_prompt_embeds_extra_hash_keys(",),
    ),
    (
        _CPU_ATTENTION,
        "CPUAttentionBackendImpl",
        ("self.scale", "self.logits_soft_cap", "self.sliding_window"),
    ),
    ("vllm.v1.engine.async_llm", "AsyncLLM", ("self.engine_core", "self.input_processor")),
    (
        "vllm.v1.worker.cpu_worker",
        "CPUWorker",
        ("CPUModelRunner(self.vllm_config", "self.use_v2_model_runner"),
    ),
)
"""Instance attributes and calls, which only the source tells: (module, class, words in it)."""


def check_seams() -> list[SeamCheck]:
    """Check every seam against the installed vLLM; never raises."""
    checks = [_version()]
    checks += [_check(seam) for seam in SEAMS]
    checks += [_check_source(*entry) for entry in ATTRIBUTES]
    return checks


def _version() -> SeamCheck:
    import vllm

    version = vllm.__version__
    supported = version.startswith(SUPPORTED)
    return SeamCheck("vllm.__version__", supported, f"{version}; supported: {SUPPORTED}x")


def _check(seam: Seam) -> SeamCheck:
    try:
        missing = set(seam.needs) - set(_names(_resolve(seam.module, seam.path)))
    except (ImportError, AttributeError) as error:
        return SeamCheck(seam.name, False, str(error))
    detail = f"lacks {', '.join(sorted(missing))}" if missing else ""
    return SeamCheck(seam.name, not missing, detail)


def _check_source(module: str, name: str, words: Sequence[str]) -> SeamCheck:
    try:
        source = inspect.getsource(_resolve(module, name))
    except (ImportError, AttributeError, OSError) as error:
        return SeamCheck(f"{module}.{name}", False, str(error))
    missing = [word for word in words if word not in source]
    detail = f"its source lacks {', '.join(missing)}" if missing else ""
    return SeamCheck(f"{module}.{name} (source)", not missing, detail)


def _resolve(module: str, path: str) -> Any:
    value = import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _names(value: Any) -> list[str]:
    """Parameters of a callable; of a class, its fields and constructor parameters too."""
    names: list[str] = []
    if inspect.isclass(value):
        names += getattr(value, "__dataclass_fields__", {})
        names += getattr(value, "__struct_fields__", ())
    if callable(value):
        # Exceptions made in C have no signature, and we ask nothing of theirs.
        with suppress(ValueError):
            names += inspect.signature(value).parameters
    return names
