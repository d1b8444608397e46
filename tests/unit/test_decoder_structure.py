"""Reading the parts of a decoder off vLLM's modules, and refusing those that are not known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.activation import MulAndSilu, SiluAndMulWithClamp
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

from headway.server.engine.decoder_parts import (
    Decoder,
    LanguageHead,
    UnknownStructureError,
    read_decoder,
)
from headway.server.engine.kept_weights import KEPT, keeping_weights, weight_of
from tests.decoder_models import CONFIGS, SIZES, decoder_model, one_rank

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[VllmConfig]:
    with one_rank() as config:
        yield config


def read(kind: str, vllm_config: VllmConfig, **options: Any) -> tuple[Decoder, Any]:
    model, attention = decoder_model(kind, vllm_config, **options)
    return read_decoder(model, attention), model


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_parts_are_those_of_the_layer(kind, vllm_config):
    decoder, model = read(kind, vllm_config)
    assert list(decoder.layers) == [0, 1]
    for index, parts in decoder.layers.items():
        layer = model.model.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        linears = {
            "qkv": attention.qkv_proj, "output": attention.o_proj,
            "gate_up": mlp.gate_up_proj, "down": mlp.down_proj,
        }  # fmt: skip
        for name, module in linears.items():
            part = getattr(parts, name)
            assert part.module is module and torch.equal(part.weight, module.weight)
        norms = {"attention_norm": layer.input_layernorm}
        if kind == "gemma3":
            norms["after_attention"] = layer.post_attention_layernorm
            norms["feedforward_norm"] = layer.pre_feedforward_layernorm
            norms["after_feedforward"] = layer.post_feedforward_layernorm
        else:
            norms["feedforward_norm"] = layer.post_attention_layernorm
            assert parts.after_attention is None and parts.after_feedforward is None
        if kind in ("qwen3", "gemma3"):
            norms |= {"query_norm": attention.q_norm, "key_norm": attention.k_norm}
        else:
            assert parts.query_norm is None and parts.key_norm is None
        for name, norm in norms.items():
            shift = 1.0 if isinstance(norm, GemmaRMSNorm) else 0.0
            assert torch.equal(getattr(parts, name).weight, norm.weight + shift)
            assert getattr(parts, name).eps == norm.variance_epsilon
        assert parts.index == index and parts.rotary is attention.rotary_emb
    assert torch.equal(decoder.head.weight, model.lm_head.weight)
    assert torch.equal(decoder.head.norm.weight, model.model.norm.weight)
    assert (decoder.head.scale, decoder.head.soft_cap) == (1.0, None)


def test_the_decoder_of_a_model_with_images_is_found(vllm_config):
    """The tower of images may have layers of its own, and even numbered ones of the same name."""
    model, attention = decoder_model("llama", vllm_config, at="language_model.model")
    tower, _ = decoder_model("qwen2", vllm_config, at="encoder")
    model.vision_tower = tower.encoder
    decoder = read_decoder(model, attention)
    layers: Any = model.get_submodule("language_model.model.layers")
    assert decoder.layers[1].qkv.module is layers[1].self_attn.qkv_proj
    assert decoder.head.weight.data_ptr() == model.language_model.lm_head.weight.data_ptr()


def test_scale_and_cap_of_the_logits_are_read(vllm_config):
    model, attention = decoder_model("llama", vllm_config)
    model.logits_processor.scale, model.logits_processor.soft_cap = 0.5, 30.0
    head: LanguageHead = read_decoder(model, attention).head
    assert (head.scale, head.soft_cap) == (0.5, 30.0)


def without(path: str) -> Any:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        delattr(model.get_submodule(owner), name)

    return change


def replaced(path: str, make: Any) -> Any:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, make())

    return change


def quantised(path: str) -> Any:
    def change(model: Any) -> None:
        model.get_submodule(path).quant_method = Fp8LinearMethod.__new__(Fp8LinearMethod)

    return change


def whole_numbers(model: Any) -> None:
    del model.lm_head.weight
    model.lm_head.weight = torch.zeros(40, 64, dtype=torch.int8)


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{LAYER}.mlp"), "LlamaDecoderLayer has no mlp"),
        (without(f"{LAYER}.mlp.act_fn"), "LlamaMLP has no act_fn"),
        (without(f"{LAYER}.mlp.down_proj"), "LlamaMLP has no down_proj"),
        (without(f"{LAYER}.self_attn.rotary_emb"), "LlamaAttention has no rotary_emb"),
        (without(f"{LAYER}.input_layernorm"), "LlamaDecoderLayer has no input_layernorm"),
        (without("model.norm"), "Module has no norm"),
        (without("lm_head"), "no lm_head"),
        (without("logits_processor"), "no lm_head"),
        (whole_numbers, "lm_head has no weight of floats"),
        (
            replaced(f"{LAYER}.post_attention_layernorm", lambda: torch.nn.LayerNorm(64)),
            "LlamaDecoderLayer.post_attention_layernorm is a LayerNorm",
        ),
        (
            replaced(f"{LAYER}.input_layernorm", lambda: RMSNorm(64, var_hidden_size=32)),
            "LlamaDecoderLayer.input_layernorm is a RMSNorm",
        ),
        (
            replaced("model.norm", lambda: RMSNorm(64, has_weight=False)),
            "Module.norm is a RMSNorm",
        ),
        (
            quantised(f"{LAYER}.self_attn.o_proj"),
            "LlamaAttention.o_proj is a RowParallelLinear with Fp8LinearMethod",
        ),
        (
            replaced(f"{LAYER}.mlp.gate_up_proj", lambda: torch.nn.Linear(64, 192)),
            "LlamaMLP.gate_up_proj is a Linear",
        ),
        (replaced(f"{LAYER}.mlp.act_fn", MulAndSilu), "activation is a MulAndSilu"),
        (
            replaced(f"{LAYER}.mlp.act_fn", lambda: SiluAndMulWithClamp(7.0)),
            "activation is a SiluAndMulWithClamp",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(change, message, vllm_config):
    model, attention = decoder_model("llama", vllm_config)
    change(model)
    with pytest.raises(UnknownStructureError, match=message):
        read_decoder(model, attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama_4_scaling": {"original_max_position_embeddings": 8, "beta": 0.1}}, "llama_4"),
        ({"ada_rms_norm_t_cond": True, "ada_rms_norm_t_cond_dim": 8}, "ada_rms_norm"),
    ],
)
def test_steps_that_only_some_mistral_layers_take_are_refused(changes, message, vllm_config):
    model, attention = decoder_model("mistral", vllm_config, **changes)
    with pytest.raises(UnknownStructureError, match=message):
        read_decoder(model, attention)


def test_two_decoders_in_a_model_are_refused(vllm_config):
    model, attention = decoder_model("llama", vllm_config)
    other, others = decoder_model("llama", vllm_config, at="draft")
    model.draft = other.draft
    name = "draft.layers.1.self_attn.attn"
    with pytest.raises(UnknownStructureError, match="draft.*model"):
        read_decoder(model, {**attention, name: others[name]})


def test_layers_that_are_not_in_a_list_are_refused(vllm_config):
    model, attention = decoder_model("llama", vllm_config)
    inner = model.model.layers[0].self_attn
    model.model.only = inner
    del model.model.layers
    with pytest.raises(UnknownStructureError, match=r"layers\.0\.self_attn\.attn is not in a list"):
        read_decoder(model, {"model.layers.0.self_attn.attn": attention[next(iter(attention))]})


def test_weights_of_the_decoder_are_kept_when_vllm_packs_them(vllm_config):
    model, attention = decoder_model("qwen2", vllm_config)
    before = {name: each.clone() for name, each in model.named_parameters()}
    original = utils.dispatch_cpu_unquantized_gemm
    with keeping_weights():
        for module in model.modules():
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
    assert utils.dispatch_cpu_unquantized_gemm is original
    for index, parts in read_decoder(model, attention).layers.items():
        prefix = f"model.layers.{index}"
        for path, part in {
            "self_attn.qkv_proj": parts.qkv, "self_attn.o_proj": parts.output,
            "mlp.gate_up_proj": parts.gate_up, "mlp.down_proj": parts.down,
        }.items():  # fmt: skip
            weight = before[f"{prefix}.{path}.weight"]
            assert torch.equal(part.weight, weight)
            rows = torch.randn(3, weight.shape[1])
            bias = before.get(f"{prefix}.{path}.bias")
            want = torch.nn.functional.linear(rows, weight, bias)
            torch.testing.assert_close(part(rows), want, atol=1e-5, rtol=1e-5)
    assert not hasattr(model.lm_head, KEPT) and torch.equal(
        model.lm_head.weight, before["lm_head.weight"]
    )


def test_a_weight_that_was_not_kept_is_missed(vllm_config):
    model, _ = decoder_model("llama", vllm_config)
    linear = model.model.layers[0].mlp.down_proj
    assert weight_of(linear).shape == (SIZES["hidden_size"], SIZES["intermediate_size"])
    linear.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj was not kept"):
        weight_of(linear)


def test_loading_that_fails_leaves_vllm_as_it_was():
    original = utils.dispatch_cpu_unquantized_gemm
    with pytest.raises(RuntimeError, match="no such file"), keeping_weights():
        assert utils.dispatch_cpu_unquantized_gemm is not original
        raise RuntimeError("no such file")
    assert utils.dispatch_cpu_unquantized_gemm is original
