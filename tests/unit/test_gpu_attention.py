"""What a steering backend adds to a vLLM backend, with one that records how it is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from headway.server.engine import gpu_attention
from headway.server.engine.attention import SteeringAttention
from headway.server.engine.gpu_attention import (
    BACKENDS,
    steering_backend,
    unsupported_cache,
    unsupported_layer,
)
from headway.server.engine.step_plan import AttentionCall, current

pytestmark = pytest.mark.unit

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, NUM_TOKENS = 4, 2, 8, 16, 3
LAYER = SimpleNamespace(layer_name="model.layers.5.self_attn.attn")


@dataclass
class Metadata:
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int = 2
    max_seq_len: int = 9


class Impl:
    def __init__(self, **fields: Any) -> None:
        self.num_heads, self.head_size, self.scale = NUM_HEADS, HEAD_SIZE, 0.25
        self.attn_type = AttentionType.DECODER
        self.logits_soft_cap: float | None = None
        self.sliding_window: Any = (-1, -1)
        self.calls: list[Any] = []
        self.extra: tuple[Any, ...] = ()
        vars(self).update(fields)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
    ) -> torch.Tensor:
        self.calls.append(attn_metadata)
        self.extra = args, kwargs
        output.fill_(1.0)
        return output

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return True


class Builder:
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> Any:
        return SimpleNamespace(prefix=common_prefix_len, fast=fast_build)


class Backend:
    @staticmethod
    def get_name() -> str:
        return "BASE"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Plan:
    """Edits the attention of layer 5, with the sequence lengths it is given."""

    tape = None

    def __init__(self, seq_lens: torch.Tensor | None = None, layers: tuple[int, ...] = (5,)):
        self.seq_lens, self.layers = seq_lens, layers
        self.calls: list[tuple[int, AttentionCall]] = []
        self.head_outputs: list[tuple[int, torch.Tensor]] = []

    def attends(self, layer: int) -> bool:
        return layer in self.layers

    def edit_attention(self, layer: int, call: AttentionCall, base: Any) -> None:
        base(self.seq_lens)
        self.calls.append((layer, call))
        call.output[:, 0] = 2.0

    def edit_head_outputs(self, layer: int, output: torch.Tensor) -> None:
        self.head_outputs.append((layer, output))


@pytest.fixture(autouse=True)
def no_plan_is_left() -> Iterator[None]:
    yield
    current.plan = None


def make_metadata() -> Metadata:
    return Metadata(
        torch.tensor([0, 2, 3]), torch.tensor([9, 4]), torch.tensor([[1], [0]]), torch.arange(3)
    )


def make_impl(takes_seq_lens: bool = True, **fields: Any) -> Any:
    return steering_backend(Backend, takes_seq_lens).get_impl_cls()(**fields)


def run(impl: Any, metadata: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Call an implementation as vLLM does; returns the tensors it was called with."""
    tensors = {
        "query": torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_SIZE),
        "key": torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE),
        "value": torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE),
        "kv_cache": torch.zeros(2, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE),
        "output": torch.zeros(NUM_TOKENS, NUM_HEADS * HEAD_SIZE),
    }
    output = tensors.pop("output")
    returned = impl.forward(LAYER, *tensors.values(), metadata, output, *args, **kwargs)
    assert returned is output
    return tensors | {"output": output}


# The implementation


def test_without_a_plan_the_base_runs_as_it_was_called():
    impl, metadata = make_impl(), make_metadata()
    ran = run(impl, metadata, "scale", output_block_scale="block")
    assert len(impl.calls) == 1 and impl.calls[0] is metadata
    assert impl.extra == (("scale",), {"output_block_scale": "block"})
    assert (ran["output"] == 1.0).all()


def test_a_plan_gets_the_call_as_vllm_made_it():
    impl, metadata, plan = make_impl(logits_soft_cap=30.0), make_metadata(), Plan()
    current.plan = plan
    ran = run(impl, metadata)
    [(layer, call)] = plan.calls
    assert layer == 5
    assert torch.equal(call.query, ran["query"]) and call.kv_cache is ran["kv_cache"]
    assert call.output.shape == call.query.shape == (NUM_TOKENS, NUM_HEADS, HEAD_SIZE)
    for name in ("block_table", "query_start_loc", "seq_lens", "slot_mapping"):
        assert getattr(call, name) is getattr(metadata, name)
    assert (call.softmax_scale, call.soft_cap) == (0.25, 30.0)
    assert (call.max_query_len, call.max_seq_len) == (2, 9)
    # What the plan wrote is what vLLM gets; the affine edits come after it.
    assert (ran["output"].view(NUM_TOKENS, NUM_HEADS, HEAD_SIZE)[:, 0] == 2.0).all()
    assert plan.head_outputs == [(5, ran["output"])]


@pytest.mark.parametrize(
    ("window", "expected"), [((127, 0), 128), ((0, 0), 1), ((-1, -1), -1), (64, 64), (-1, -1)]
)
def test_windows_are_counted_in_keys_and_no_soft_cap_is_zero(window, expected):
    current.plan = plan = Plan()
    run(make_impl(sliding_window=window, logits_soft_cap=None), make_metadata())
    [(_, call)] = plan.calls
    assert (call.sliding_window, call.soft_cap) == (expected, 0.0)


def test_the_base_pretends_lengths_only_where_it_is_told():
    metadata, pretended = make_metadata(), torch.tensor([0, 4])
    impl = make_impl()
    current.plan = Plan()
    run(impl, metadata)
    assert impl.calls[0] is metadata
    current.plan = Plan(pretended)
    run(impl, metadata)
    assert impl.calls[1].seq_lens is pretended
    assert impl.calls[1].slot_mapping is metadata.slot_mapping
    assert metadata.seq_lens.tolist() == [9, 4]  # other layers share it


@pytest.mark.parametrize("takes_seq_lens", [True, False])
def test_a_plan_is_told_whether_lengths_can_be_pretended(takes_seq_lens):
    current.plan = plan = Plan()
    run(make_impl(takes_seq_lens), make_metadata())
    assert plan.calls[0][1].base_takes_seq_lens is takes_seq_lens


def test_a_layer_whose_weights_are_left_alone_still_has_its_head_outputs_edited():
    impl, metadata = make_impl(), make_metadata()
    current.plan = plan = Plan(layers=(4,))
    ran = run(impl, metadata)
    assert impl.calls[0] is metadata and not plan.calls
    assert plan.head_outputs == [(5, ran["output"])]


@pytest.mark.parametrize(
    "attn_type",
    [AttentionType.ENCODER, AttentionType.ENCODER_ONLY, AttentionType.ENCODER_DECODER],
)
def test_attention_of_an_encoder_passes_untouched(attn_type):
    impl, metadata = make_impl(attn_type=attn_type), make_metadata()
    current.plan = plan = Plan()
    run(impl, metadata)
    assert impl.calls[0] is metadata
    assert not plan.calls and not plan.head_outputs


def test_a_profiling_run_without_metadata_passes_untouched():
    impl = make_impl()
    current.plan = plan = Plan()
    run(impl, None)
    assert impl.calls == [None]
    assert not plan.calls and not plan.head_outputs


def test_outputs_are_not_quantised_before_they_are_edited():
    assert Impl().fused_output_quant_supported("fp8")
    assert not make_impl().fused_output_quant_supported("fp8")


# The backend


def test_a_backend_stays_what_it_was_but_for_its_implementation():
    backend = steering_backend(Backend, takes_seq_lens=True)
    assert issubclass(backend, Backend) and backend.get_name() == "BASE"
    assert backend.get_builder_cls() is Builder
    impl = backend.get_impl_cls()
    assert issubclass(impl, SteeringAttention) and issubclass(impl, Impl)
    assert impl.__mro__.index(SteeringAttention) < impl.__mro__.index(Impl)
    assert backend.get_impl_cls() is impl


def test_metadata_that_lacks_the_batch_gets_it_from_the_builder():
    builder = steering_backend(Backend, takes_seq_lens=False).get_builder_cls()
    assert issubclass(builder, Builder)
    batch = make_metadata()
    common = SimpleNamespace(**{**vars(batch), "block_table_tensor": batch.block_table})
    del common.block_table
    metadata = builder().build(7, common, fast_build=True)
    assert (metadata.prefix, metadata.fast) == (7, True)
    for name in vars(batch):
        assert getattr(metadata, name) is getattr(batch, name)


@pytest.fixture
def installed() -> Iterator[None]:
    members = [AttentionBackendEnum[name] for name in BACKENDS]
    assert not any(member.is_overridden() for member in members)
    gpu_attention.install()
    yield
    for member in members:
        member.clear_override()


def test_vllm_looks_up_a_steering_backend(installed):
    backend = AttentionBackendEnum.TRITON_ATTN.get_class()
    assert issubclass(backend, TritonAttentionBackend)
    assert backend.get_name() == TritonAttentionBackend.get_name()
    assert issubclass(backend.get_impl_cls(), TritonAttentionImpl)
    assert issubclass(backend.get_impl_cls(), SteeringAttention)
    assert AttentionBackendEnum.TRITON_ATTN.get_class() is backend


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_is_registered_by_the_name_of_its_module(installed, name):
    assert AttentionBackendEnum[name].get_path() == f"{gpu_attention.__name__}.{name}"


def test_no_other_name_is_a_backend():
    with pytest.raises(AttributeError, match="ROCM_ATTN"):
        _ = gpu_attention.ROCM_ATTN


# What cannot be steered


def layer_of(impl: Any, kv_cache: torch.Tensor | None = None, backend: Any = None) -> Any:
    backend = backend or steering_backend(Backend, takes_seq_lens=True)
    return SimpleNamespace(impl=impl, kv_cache=kv_cache, attn_backend=backend)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, None),
        ({"alibi_slopes": None, "sinks": None, "chunk_lookback": -1}, None),
        ({"alibi_slopes": torch.ones(NUM_HEADS)}, "ALiBi"),
        ({"sinks": torch.ones(NUM_HEADS)}, "learned attention sinks"),
        ({"chunk_lookback": 0}, "chunked local attention"),
    ],
)
def test_layers_whose_weights_cannot_be_edited(fields, words):
    layer = layer_of(make_impl(**fields))
    reason = unsupported_layer(layer, edits=True)
    assert reason is None if words is None else words in reason
    assert unsupported_layer(layer, edits=False) is None


def test_a_backend_derived_from_ours_may_cut_the_batch_otherwise():
    derived = type("Chunked", (steering_backend(Backend, takes_seq_lens=True),), {})
    layer = layer_of(make_impl(), backend=derived)
    assert "Chunked changes the batch" in unsupported_layer(layer, edits=True)
    assert unsupported_layer(layer, edits=False) is None


@pytest.mark.parametrize("edits", [True, False])
def test_a_foreign_implementation_is_named_with_those_known(edits):
    reason = unsupported_layer(layer_of(Impl()), edits)
    assert "is Impl" in reason
    assert all(name in reason for name in BACKENDS)


def cache_of(content: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(3, NUM_KV_HEADS, BLOCK_SIZE, content, dtype=dtype)


@pytest.mark.parametrize(
    ("cache", "readable"),
    [
        (cache_of(2 * HEAD_SIZE), True),
        (torch.zeros(3, BLOCK_SIZE, NUM_KV_HEADS, 2 * HEAD_SIZE).transpose(1, 2), True),
        # Quantised per token and head: a float32 scale follows every key and every value.
        (cache_of(2 * (HEAD_SIZE + 4), torch.uint8), False),
        (torch.zeros(2, 3, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE), False),
        (torch.zeros(3, NUM_KV_HEADS, 2 * HEAD_SIZE, BLOCK_SIZE).transpose(2, 3), False),
    ],
)
def test_caches_that_the_kernels_read(cache, readable):
    reason = unsupported_cache(layer_of(make_impl(), cache))
    assert reason is None if readable else str(tuple(cache.shape)) in reason


@pytest.mark.parametrize(
    ("version", "schedule", "may"), [(2, None, True), (3, None, False), (3, object(), True)]
)
def test_flash_attention_is_told_other_lengths_only_where_nobody_else_notices(
    version, schedule, may
):
    impl = SimpleNamespace(vllm_flash_attn_version=version)
    metadata = SimpleNamespace(scheduler_metadata=schedule)
    assert gpu_attention._flash_may_pretend(impl, metadata) is may
