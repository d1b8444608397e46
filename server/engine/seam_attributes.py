"""What Headway's engine reads in the sources of vLLM; `seams.py` checks it.

Instance attributes and calls, which no signature tells.
"""

from __future__ import annotations

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_KV_MANAGER = "vllm.v1.core.kv_cache_manager"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
_CPU_WORKER = "vllm.v1.worker.cpu_worker"
_REGISTRY = "vllm.v1.attention.backends.registry"
_TRITON_ATTENTION = "vllm.v1.attention.backends.triton_attn"
_V2 = "vllm.v1.worker.gpu"
_GPU_WORKER = "vllm.v1.worker.gpu_worker"
_SAMPLER = "vllm.v1.sample.sampler"
_LAYERS = "vllm.model_executor.layers"
_MODELS = "vllm.model_executor.models"

ATTRIBUTES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        _SCHEDULER,
        "Scheduler",
        (
            "self.requests",
            "self.running",
            "self.waiting",
            "self.kv_holding_waiting",
            "self._inflight_prefills",
            "self.num_waiting_for_streaming_input",
            "self.max_num_active_reqs",
            "self.vllm_config",
            "self.policy",
            "self.block_size",
            "self.kv_cache_manager",
            "encoder_cache_mismatch_reqs",
            "self._handle_blocked_waiting_request(request)",
            "self._try_schedule_encoder_inputs(",
        ),
    ),
    (_KV_MANAGER, "KVCacheManager", ("self.block_pool", "self.kv_cache_config")),
    ("vllm.v1.core.block_pool", "BlockPool", ("self.null_block",)),
    (
        "vllm.v1.request",
        "Request",
        (
            "self.status",
            "self.num_computed_tokens",
            "self.num_in_flight_tokens",
            "self.num_preemptions",
            "self.num_prompt_tokens",
            "self._block_hasher",
            "self.arrival_time",
        ),
    ),
    (
        _RUNNER,
        "GPUModelRunner",
        (
            "self.input_batch",
            "self._update_states(",
            "_prepare_inputs(",
            "self.dtype = ",
            "self.sampler = Sampler(",
            "self.positions = ",
            "self.uses_mrope = ",
            "self.mrope_positions = ",
            "self.discard_request_mask = ",
        ),
    ),
    (
        _RUNNER,
        "GPUModelRunner._prepare_inputs",
        (
            "self.discard_request_mask.np[:num_reqs] = (",
            "self.positions[:total_num_scheduled_tokens] = (",
            "self.mrope_positions.gpu[",
        ),
    ),
    (
        _RUNNER,
        "GPUModelRunner.sample_tokens",
        (") = self.execute_model_state", "apply_grammar_bitmask(", "self._sample(logits"),
    ),
    (_RUNNER, "GPUModelRunner._bookkeeping_sync", ("gen.set_offset(gen.get_offset() - 4)",)),
    ("vllm.v1.worker.gpu_input_batch", "InputBatch", ("generators=self.generators",)),
    (_RUNNER, "GPUModelRunner._sample", ("return self.sampler(",)),
    (_SAMPLER, "Sampler.forward", ("self.sample(logits, sampling_metadata)",)),
    (_SAMPLER, "Sampler.sample", ("temperature < _SAMPLING_EPS", "logitsprocs.argmax_invariant")),
    ("vllm.v1.sample.logits_processor", "LogitsProcessors", ("self.argmax_invariant",)),
    (
        f"{_LAYERS}.linear",
        "UnquantizedLinearMethod.process_weights_after_loading",
        ("layers.utils import dispatch_cpu_unquantized_gemm",),
    ),
    (f"{_LAYERS}.linear", "LinearBase", ("self.prefix = ", "self.quant_method")),
    (
        f"{_LAYERS}.layernorm",
        "RMSNorm",
        ("self.weight", "self.has_weight", "self.variance_epsilon", "self.variance_size_override"),
    ),
    (f"{_LAYERS}.layernorm", "GemmaRMSNorm", ("self.weight", "self.variance_epsilon")),
    (f"{_LAYERS}.activation", "GeluAndMul", ("self.approximate",)),
    (
        f"{_LAYERS}.rotary_embedding.base",
        "RotaryEmbeddingBase",
        ("self.head_size", "self.rotary_dim", "self.is_neox_style"),
    ),
    (
        f"{_LAYERS}.logits_processor",
        "LogitsProcessor",
        ("self.scale", "self.soft_cap", "self.org_vocab_size"),
    ),
    (f"{_MODELS}.llama", "LlamaForCausalLM", ("self.lm_head", "self.logits_processor")),
    (f"{_MODELS}.llama", "LlamaModel", ("self.layers", "self.norm")),
    (
        f"{_MODELS}.llama",
        "LlamaDecoderLayer",
        ("self.self_attn", "self.mlp", "self.input_layernorm", "self.post_attention_layernorm"),
    ),
    (f"{_MODELS}.mistral", "MistralAttention", ("self.do_llama_4_scaling",)),
    (f"{_MODELS}.mistral", "MistralDecoderLayer", ("self.ada_rms_norm_t_cond",)),
    (f"{_MODELS}.llama", "LlamaAttention", ("self.qkv_proj", "self.o_proj", "self.rotary_emb")),
    (f"{_MODELS}.llama", "LlamaMLP", ("self.gate_up_proj", "self.down_proj", "self.act_fn")),
    (f"{_MODELS}.qwen3", "Qwen3Attention", ("self.q_norm", "self.k_norm")),
    (
        f"{_MODELS}.gemma3",
        "Gemma3DecoderLayer",
        ("self.pre_feedforward_layernorm", "self.post_feedforward_layernorm"),
    ),
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
        _CPU_WORKER,
        "CPUWorker",
        ("CPUModelRunner(self.vllm_config", "self.use_v2_model_runner"),
    ),
    (
        _REGISTRY,
        "AttentionBackendEnum",
        (
            'FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"',
            'FLASHINFER = "vllm.v1.attention.backends.flashinfer.FlashInferBackend"',
        ),
    ),
    (
        _TRITON_ATTENTION,
        "TritonAttentionImpl",
        (
            "self.num_heads",
            "self.head_size",
            "self.scale",
            "self.attn_type",
            "self.logits_soft_cap",
            "self.sliding_window = (-1, -1)",
            "self.sliding_window = (sliding_window - 1, 0)",
            "self.alibi_slopes",
            "self.sinks",
            "self.chunk_lookback",
        ),
    ),
    ("vllm.model_executor.layers.attention", "Attention", ("self.attn_backend =",)),
    (_GPU_WORKER, "Worker", ("self._make_model_runner()", "self.use_v2_model_runner")),
    (
        f"{_V2}.model_runner",
        "GPUModelRunner",
        (
            "self.model_state = init_model_state(",
            "self.finish_requests(",
            "preempted_req_ids",
            "self.model_state.add_request(",
            "self.model_state.preprocess_state(",
            "self.model_state.initialize_kv_cache(",
            "self.cudagraph_manager = ModelCudaGraphManager(",
            "self.cudagraph_manager.run_fullgraph(",
            "self.cudagraph_manager.run_pw_graph(",
            "self.attn_groups",
            "self.max_num_tokens",
            "self.max_num_reqs",
            "self.is_last_pp_rank",
        ),
    ),
    (f"{_V2}.model_states", "init_model_state", ("resolve_model_state_cls(",)),
    (f"{_V2}.block_table", "BlockTables", ("self.slot_mappings",)),
    (f"{_V2}.async_utils", "AsyncOutput", ("self.model_runner_output",)),
)
"""(module, name in it, words of its source)."""
