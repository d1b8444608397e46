"""The vLLM symbols that Headway's engine relies on, file by file; `seams.py` checks them."""

from __future__ import annotations

from dataclasses import dataclass

from headway.server.engine.seam_modules import (
    BACKEND,
    CPU_ATTENTION,
    CPU_RUNNER,
    CPU_WORKER,
    GPU_WORKER,
    KV_MANAGER,
    LAYERS,
    REGISTRY,
    RUNNER,
    SAMPLER,
    SCHEDULER,
    TRITON_ATTENTION,
    V2,
)


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


CPU_MODULES = (CPU_ATTENTION, CPU_WORKER, CPU_RUNNER)
"""Not to be imported where vLLM does not serve on CPU: the worker replaces parts of torch."""

_FORWARD = ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
_BATCH = ("query_start_loc", "seq_lens", "slot_mapping", "max_query_len", "max_seq_len")

SEAMS: tuple[Seam, ...] = (
    # plugin.py, config.py, geometry.py
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    Seam("vllm.config", "VllmConfig", ("additional_config", "speculative_config")),
    Seam("vllm.config", "VllmConfig.use_v2_model_runner"),
    Seam("vllm.config", "CacheConfig", ("cache_dtype", "block_size")),
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
    Seam("vllm.config", "ModelConfig.is_mm_prefix_lm"),
    Seam("vllm.config", "ModelConfig.rswa_window"),
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
    # isolation.py
    Seam("vllm.v1.engine", "EngineCoreRequest", ("cache_salt",)),
    Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient.add_request_async",
        ("self", "request"),
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
        SCHEDULER,
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Seam("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"),
    # tainted_blocks.py
    Seam(SCHEDULER, "Scheduler._free_request_blocks", ("self", "request")),
    Seam("vllm.v1.core.block_pool", "BlockPool.get_new_blocks", ("self", "num_blocks")),
    # text_pass_scheduler.py, text_passes.py
    Seam(SCHEDULER, "Scheduler.add_request", ("self", "request")),
    Seam(SCHEDULER, "Scheduler.finish_requests", ("self", "request_ids", "finished_status")),
    Seam(SCHEDULER, "Scheduler.schedule", ("self",)),
    Seam(SCHEDULER, "Scheduler._handle_blocked_waiting_request", ("self", "request")),
    Seam(
        SCHEDULER,
        "Scheduler._try_schedule_encoder_inputs",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
    ),
    Seam(SCHEDULER, "Scheduler._update_after_schedule", ("self", "scheduler_output")),
    Seam(SCHEDULER, "Scheduler.reset_prefix_cache", ("self",)),
    Seam("vllm.v1.core.sched.request_queue", "create_request_queue", ("policy",)),
    Seam("vllm.v1.core.sched.request_queue", "RequestQueue.prepend_requests", ("self", "requests")),
    Seam("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks", ("self",)),
    Seam("vllm.v1.engine", "EngineCoreOutputs", ("outputs",)),
    Seam(
        "vllm.v1.request",
        "Request",
        ("request_id", "prompt_token_ids", "lora_request", "cache_salt", "block_hasher"),
    ),
    # prompt.py, for text_pass_scheduler.py
    Seam(
        "vllm.config",
        "SchedulerConfig",
        ("max_num_batched_tokens", "max_num_scheduled_tokens", "long_prefill_token_threshold"),
    ),
    Seam(KV_MANAGER, "KVCacheManager.get_block_ids", ("self", "request_id")),
    Seam(KV_MANAGER, "KVCacheManager.evict_blocks", ("self", "block_ids")),
    Seam(
        "vllm.v1.outputs",
        "ModelRunnerOutput",
        (
            "req_ids",
            "req_id_to_index",
            "sampled_token_ids",
            "prompt_logprobs_dict",
            "prompt_token_id_logprobs_dict",
        ),
    ),
    # attention.py
    Seam(BACKEND, "AttentionType.DECODER"),
    Seam("vllm.model_executor.models.utils", "extract_layer_index", ("layer_name",)),
    # cpu_attention.py, config.py
    Seam(CPU_ATTENTION, "CPUAttentionBackend.get_impl_cls"),
    Seam(CPU_ATTENTION, "CPUAttentionBackendImpl.forward", _FORWARD),
    Seam(REGISTRY, "register_backend", ("backend", "class_path")),
    Seam(REGISTRY, "AttentionBackendEnum.CPU_ATTN"),
    Seam(
        CPU_ATTENTION,
        "CPUAttentionMetadata",
        ("query_start_loc", "seq_lens", "block_table", "slot_mapping"),
    ),
    Seam(CPU_ATTENTION, "_get_attn_isa", ("dtype", "block_size", "head_size", "kv_cache_dtype")),
    # gpu_attention.py; FLASH_ATTN and FLASHINFER can be imported on GPU only, see ATTRIBUTES
    Seam(REGISTRY, "AttentionBackendEnum.FLASH_ATTN"),
    Seam(REGISTRY, "AttentionBackendEnum.FLASHINFER"),
    Seam(REGISTRY, "AttentionBackendEnum.TRITON_ATTN"),
    Seam("vllm.utils.import_utils", "resolve_obj_by_qualname", ("qualname",)),
    Seam(TRITON_ATTENTION, "TritonAttentionBackend.get_impl_cls"),
    Seam(TRITON_ATTENTION, "TritonAttentionBackend.get_builder_cls"),
    Seam(TRITON_ATTENTION, "TritonAttentionImpl.forward", _FORWARD),
    Seam(
        TRITON_ATTENTION, "TritonAttentionImpl.fused_output_quant_supported", ("self", "quant_key")
    ),
    Seam(TRITON_ATTENTION, "TritonAttentionMetadata", (*_BATCH, "block_table")),
    Seam(BACKEND, "CommonAttentionMetadata", (*_BATCH, "block_table_tensor")),
    Seam(
        BACKEND,
        "AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata"),
    ),
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
    Seam(f"{LAYERS}.layernorm", "RMSNorm.forward_native", ("self", "x", "residual")),
    Seam(f"{LAYERS}.layernorm", "GemmaRMSNorm.forward_native", ("self", "x", "residual")),
    # cpu_worker.py
    Seam(CPU_WORKER, "CPUModelRunner"),
    Seam(CPU_WORKER, "CPUWorker.init_device", ("self",)),
    Seam(CPU_RUNNER, "CPUModelRunner.load_model", ("self",)),
    Seam(RUNNER, "GPUModelRunner._update_states", ("self", "scheduler_output")),
    Seam(
        RUNNER,
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
    ),
    Seam(RUNNER, "GPUModelRunner.execute_model", ("self", "scheduler_output")),
    Seam(RUNNER, "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    Seam(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        (
            "scheduled_new_reqs",
            "finished_req_ids",
            "preempted_req_ids",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
        ),
    ),
    Seam("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params")),
    Seam("vllm.distributed", "get_tp_group"),
    Seam(RUNNER, "ExecuteModelState", ("logits", "sample_hidden_states")),
    Seam(RUNNER, "GPUModelRunner._model_forward", ("self", "input_ids")),
    # gated_request_scheduler.py
    Seam("vllm.v1.request", "Request.is_finished", ("self",)),
    Seam("vllm.v1.request", "RequestStatus.RUNNING"),
    Seam("vllm.v1.request", "RequestStatus.PREEMPTED"),
    # sampling_gate.py, cpu_sampling.py
    Seam("vllm", "SamplingParams", ("seed",)),
    Seam("vllm", "SamplingParams.all_stop_token_ids"),
    Seam(SAMPLER, "Sampler.sample", ("self", "logits", "sampling_metadata")),
    Seam(SAMPLER, "Sampler.apply_temperature", ("logits", "temp", "all_random")),
    Seam(
        "vllm.v1.sample.metadata",
        "SamplingMetadata",
        ("all_greedy", "all_random", "temperature", "top_k", "top_p", "logitsprocs"),
    ),
    Seam("vllm.v1.sample.logits_processor", "LogitsProcessor.apply", ("self", "logits")),
    Seam(
        "vllm.v1.sample.ops.topk_topp_sampler",
        "apply_top_k_top_p_pytorch",
        ("logits", "k", "p", "allow_cpu_sync"),
    ),
    # kept_weights.py
    Seam(f"{LAYERS}.utils", "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
    # decoder_parts.py
    Seam(f"{LAYERS}.layernorm", "RMSNorm", ("hidden_size", "eps", "var_hidden_size")),
    Seam(f"{LAYERS}.layernorm", "GemmaRMSNorm", ("hidden_size", "eps")),
    Seam(f"{LAYERS}.activation", "SiluAndMul"),
    Seam(f"{LAYERS}.activation", "GeluAndMul", ("approximate",)),
    Seam(
        f"{LAYERS}.rotary_embedding",
        "RotaryEmbedding.forward_native",
        ("self", "positions", "query", "key"),
    ),
    Seam(
        f"{LAYERS}.rotary_embedding",
        "MRotaryEmbedding.forward_native",
        ("self", "positions", "query", "key"),
    ),
    # gpu_worker.py, gpu_tables.py
    Seam(GPU_WORKER, "Worker.init_device", ("self",)),
    Seam(GPU_WORKER, "Worker.compile_or_warm_up_model", ("self",)),
    Seam(GPU_WORKER, "Worker._make_model_runner", ("self",)),
    Seam("vllm.utils.torch_utils", "async_tensor_h2d", ("data", "out")),
    # gpu_runner.py
    Seam(f"{V2}.model_runner", "GPUModelRunner.load_model", ("self",)),
    Seam(f"{V2}.model_runner", "GPUModelRunner.finish_requests", ("self", "scheduler_output")),
    Seam(
        f"{V2}.model_runner",
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output", "intermediate_tensors", "dummy_run"),
    ),
    Seam(f"{V2}.model_runner", "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    Seam(f"{V2}.model_runner", "GPUModelRunner.capture_model", ("self",)),
    Seam(
        f"{V2}.model_runner",
        "GPUModelRunner._dummy_run",
        ("self", "num_tokens", "uniform_decode", "skip_eplb"),
    ),
    Seam(f"{V2}.model_states", "resolve_model_state_cls", ("vllm_config", "model")),
    Seam(
        f"{V2}.model_states.interface",
        "ModelState.add_request",
        ("self", "req_index", "new_req_data"),
    ),
    Seam(f"{V2}.model_states.interface", "ModelState.preprocess_state", ("self", "input_batch")),
    Seam(
        f"{V2}.model_states.interface",
        "ModelState.initialize_kv_cache",
        ("self", "kv_cache_config", "block_tables"),
    ),
    Seam(
        f"{V2}.input_batch",
        "InputBatch",
        ("req_ids", "num_scheduled_tokens", "num_computed_tokens_np"),
    ),
    Seam(
        f"{V2}.cudagraph_utils",
        "ModelCudaGraphManager.dispatch",
        ("self", "num_reqs", "num_tokens"),
    ),
    Seam(
        f"{V2}.cudagraph_utils",
        "BatchExecutionDescriptor",
        ("cg_mode", "num_tokens", "num_reqs", "num_active_loras"),
    ),
    Seam("vllm.config", "CUDAGraphMode.NONE"),
    Seam(f"{V2}.cudagraph_utils", "ModelCudaGraphManager.run_fullgraph", ("self", "desc")),
    Seam(
        f"{V2}.cudagraph_utils",
        "ModelCudaGraphManager.run_pw_graph",
        ("self", "model", "model_inputs"),
    ),
    Seam(
        "vllm.v1.worker.utils",
        "AttentionGroup",
        ("layer_names", "kv_cache_group_id", "kernel_block_stride"),
    ),
    Seam(f"{V2}.model_runner", "ExecuteModelState", ("input_batch", "hidden_states")),
    Seam(f"{V2}.async_utils", "AsyncOutput.get_output", ("self",)),
    # client.py
    Seam("vllm.v1.engine.async_llm", "AsyncLLM.errored"),
    Seam("vllm.v1.engine.core_client", "AsyncMPClient.call_utility_all_async", ("self", "method")),
    # drain.py
    Seam("vllm.config", "VllmConfig", ("shutdown_timeout",)),
    Seam("vllm.v1.engine", "EngineCoreRequestType.ADD"),
    Seam("vllm.v1.engine", "EngineCoreRequestType.UTILITY"),
    Seam(
        "vllm.v1.engine.core",
        "EngineCoreProc._handle_client_request",
        ("self", "request_type", "request"),
    ),
    Seam(
        "vllm.v1.engine.core",
        "EngineCoreProc._reject_utility_in_shutdown",
        ("self", "client_idx", "call_id", "method_name"),
    ),
    Seam("vllm.v1.engine.core", "EngineCoreProc.has_work", ("self",)),
    Seam("vllm.v1.engine.core", "EngineCoreProc.is_running", ("self",)),
    Seam("vllm.v1.engine.core", "EngineCore.collective_rpc", ("self", "method", "timeout", "args")),
)
