"""Seam: the output of attention on vLLM's CUDA backends.

vLLM symbols relied on: the backends FLASH_ATTN, FLASHINFER and TRITON_ATTN of
`AttentionBackendEnum`, whose values are the names of classes that have `get_impl_cls` and
`get_builder_cls`; of their implementations `forward`, `scale`, `logits_soft_cap`, `sliding_window`,
`alibi_slopes`, `sinks`, `fused_output_quant_supported`; of FLASH_ATTN's and TRITON_ATTN's metadata
`query_start_loc`, `seq_lens`, `block_table`, `slot_mapping`, `max_query_len`, `max_seq_len`, which
`CommonAttentionMetadata` has under the same names (but `block_table_tensor`).

All three keep keys and values side by side in a cache that is logically [num_blocks, num_kv_heads,
block_size, 2 * head_size]; what FLASHINFER's metadata lacks its builder adds. Only where the base
kernel reads its sequence lengths on the device when it runs is it spared the rows that Headway
computes; `docs/design.md` says which.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from headway.server.engine.attention import SteeringAttention

BACKENDS = {"FLASH_ATTN": True, "TRITON_ATTN": True, "FLASHINFER": False}
"""vLLM's name of a backend -> whether its kernel reads the metadata's `seq_lens` when it runs."""


class _WithBatch:
    """Mixed into a metadata builder: the metadata tells where rows, keys and slots are."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kw)  # type: ignore[misc]
        common = common_attn_metadata
        metadata.query_start_loc = common.query_start_loc
        metadata.seq_lens = common.seq_lens
        metadata.block_table = common.block_table_tensor
        metadata.slot_mapping = common.slot_mapping
        metadata.max_query_len = common.max_query_len
        metadata.max_seq_len = common.max_seq_len
        return metadata


def steering_backend(base: Any, takes_seq_lens: bool, **further: Any) -> Any:
    """A vLLM attention backend whose implementation also carries out edits.

    takes_seq_lens: whether its kernel reads the metadata's sequence lengths when it runs.
    further: members of the implementation.
    """
    impl = base.get_impl_cls()
    members: dict[str, Any] = {
        "base_takes_seq_lens": takes_seq_lens,
        # Head outputs are edited after the kernel: it must not quantise them before.
        "fused_output_quant_supported": lambda self, quant_key: False,
        **further,
    }
    steering_impl = type(f"Steering{impl.__name__}", (SteeringAttention, impl), members)
    backend: dict[str, Any] = {
        "get_impl_cls": staticmethod(lambda: steering_impl),
        "headway_wraps": True,
    }
    if not takes_seq_lens:
        builder = base.get_builder_cls()
        with_batch = type(f"Steering{builder.__name__}", (_WithBatch, builder), {})
        backend["get_builder_cls"] = staticmethod(lambda: with_batch)
    return type(f"Steering{base.__name__}", (base,), backend)


def install() -> None:
    """Have vLLM build attention layers with steering implementations; it picks the backend."""
    for name in BACKENDS:
        register_backend(AttentionBackendEnum[name], f"{__name__}.{name}")


@lru_cache(maxsize=len(BACKENDS))
def _backend(name: str) -> Any:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    base = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    further = {"may_pretend": _flash_may_pretend} if name == "FLASH_ATTN" else {}
    return steering_backend(base, BACKENDS[name], **further)


def _flash_may_pretend(impl: Any, metadata: Any) -> bool:
    """FlashAttention 3 without a schedule made in advance divides all sequences by their lengths.

    Told others for some it would divide the rest differently, and change their last bits.
    """
    scheduled = getattr(metadata, "scheduler_metadata", None) is not None
    return scheduled or getattr(impl, "vllm_flash_attn_version", None) != 3


def __getattr__(name: str) -> Any:
    # vLLM resolves a registered backend by module and name, and imports only the one it chose.
    if name in BACKENDS:
        return _backend(name)
    raise AttributeError(name)


def unsupported_layer(layer: Any, edits: bool) -> str | None:
    """Why an attention layer of the decoder cannot be steered, or None if it can.

    edits: whether attention weights may be edited in this engine, as its configuration tells.
    """
    impl = layer.impl
    if not isinstance(impl, SteeringAttention):
        known = ", ".join(BACKENDS)
        return f"its attention backend is {type(impl).__name__}; Headway wraps {known}"
    if not edits:
        return None
    if not vars(layer.attn_backend).get("headway_wraps"):
        # vLLM subclasses backends where it cuts requests up (chunks) or adds keys (sinks).
        return f"its attention backend {layer.attn_backend.__name__} changes the batch"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "it has ALiBi"
    if getattr(impl, "sinks", None) is not None:
        return "it has learned attention sinks"
    if getattr(impl, "chunk_lookback", -1) > -1:
        return "it has chunked local attention"
    return None


def unsupported_cache(layer: Any) -> str | None:
    """Why a layer's KV cache cannot be read by Headway's kernels, or None if it can."""
    cache, head_size = layer.kv_cache, layer.impl.head_size
    if cache.dim() != 4 or cache.shape[3] != 2 * head_size or cache.stride(3) != 1:
        return f"its KV cache is {tuple(cache.shape)}, not [blocks, KV heads, block, key and value]"
    return None
