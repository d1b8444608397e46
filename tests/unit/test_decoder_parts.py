"""The way back through the parts of a decoder, against autograd through vLLM's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope

from headway.kernels.row_gradients import turn_back
from headway.server.engine.decoder_parts import Decoder, LanguageHead, Norm, read_decoder, turn_of
from tests.decoder_models import CONFIGS, SIZES, decoder_model, one_rank

pytestmark = pytest.mark.unit

HIDDEN, VOCABULARY = SIZES["hidden_size"], SIZES["vocab_size"]
ROWS, CANDIDATES = 3, 5
CLOSE = {"atol": 2e-5, "rtol": 2e-4}


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[VllmConfig]:
    with one_rank() as config:
        yield config


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request: pytest.FixtureRequest, vllm_config: VllmConfig) -> tuple[Decoder, Any]:
    model, attention = decoder_model(request.param, vllm_config)
    return read_decoder(model, attention), model.model.layers[0]


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def backward(function: Any, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """By autograd, for the gradients [rows, candidates, ...] of what function makes of x."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        y = function(x)
        each = [
            torch.autograd.grad(y, x, grad[:, at], retain_graph=True)[0]
            for at in range(grad.shape[1])
        ]
    return torch.stack(each, dim=1)


NORMS = {
    "attention_norm": "input_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "after_attention": "post_attention_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "after_feedforward": "post_feedforward_layernorm",
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name, loaded):
    decoder, layer = loaded
    norm, path = getattr(decoder.layers[0], name), NORMS[name]
    if norm is None:
        assert name not in ("attention_norm", "feedforward_norm")
        return
    if name == "feedforward_norm" and hasattr(layer, "pre_feedforward_layernorm"):
        path = "pre_feedforward_layernorm"
    module = layer.get_submodule(path)
    size = module.weight.shape[0]
    x, grad = drawn(ROWS, size), drawn(ROWS, CANDIDATES, size, seed=1)
    torch.testing.assert_close(norm(x), module.forward_native(x), **CLOSE)
    want = backward(module.forward_native, x, grad)
    torch.testing.assert_close(norm.backward(x, grad), want, **CLOSE)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_norms_of_heads_and_of_small_and_large_rows(scale):
    """In float64, with an eps that counts for the small ones; rows of heads keep their shape."""
    norm = Norm(drawn(8, seed=2).double(), 1e-5)
    x, grad = drawn(ROWS, 4, 8, scale=scale).double(), drawn(ROWS, CANDIDATES, 4, 8).double()
    want = backward(norm, x, grad)
    torch.testing.assert_close(norm.backward(x, grad), want)


def test_activations(loaded):
    decoder, layer = loaded
    parts, act_fn = decoder.layers[0], layer.mlp.act_fn
    gate, up = drawn(ROWS, 50, scale=3.0), drawn(ROWS, 50, seed=1)
    gate[0, :4] = torch.tensor([0.0, -30.0, 30.0, 1e-6])

    def gated(gate: torch.Tensor) -> torch.Tensor:
        return act_fn.forward_native(torch.cat([gate, up], dim=-1))

    torch.testing.assert_close(parts.activation(gate) * up, gated(gate), **CLOSE)
    want = backward(gated, gate, torch.ones(ROWS, 1, 50))[:, 0]
    torch.testing.assert_close(parts.slope(gate) * up, want, **CLOSE)


@pytest.mark.parametrize("name", ["qkv", "output", "gate_up", "down"])
def test_linear_layers(name, loaded):
    part = getattr(loaded[0].layers[1], name)
    weight, bias = part.weight.double(), part.module.bias
    out_features, in_features = weight.shape
    x = drawn(ROWS, in_features).double()
    grad = drawn(ROWS, CANDIDATES, out_features, seed=1)
    bias = None if bias is None else bias.detach().double()
    want = backward(lambda x: torch.nn.functional.linear(x, weight, bias), x, grad.double())
    torch.testing.assert_close(part.backward(grad), want.float(), **CLOSE)


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "half": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
MROPES: dict[str, dict[str, Any]] = {
    "sections": {"mrope_section": [4, 6, 6]},
    "interleaved sections": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
POSITIONS = torch.tensor([0, 77, 3])
HEADS, HEAD_SIZE = 4, 32


def rope(is_neox_style: bool, **parameters: Any) -> Any:
    return get_rope(
        HEAD_SIZE,
        max_position=128,
        is_neox_style=is_neox_style,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, **parameters},
        dtype=torch.float32,
    )


def check_rotation(rotary: Any, positions: torch.Tensor) -> torch.Tensor:
    """Of queries and of keys; returns what the rotation makes of a drawn gradient."""
    size = rotary.head_size
    x, grad = drawn(ROWS, HEADS, size), drawn(ROWS, CANDIDATES, HEADS, size, seed=1)
    turn = turn_of(rotary, positions, torch.float32)
    found = turn_back([(grad, turn)]).unflatten(-1, (HEADS, size))
    for which in (0, 1):

        def turned(x: torch.Tensor, which: int = which) -> torch.Tensor:
            rows = x.flatten(1)
            return rotary.forward_native(positions, rows, rows.clone())[which].view(x.shape)

        torch.testing.assert_close(found, backward(turned, x, grad), **CLOSE)
    return found


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("kind", ROPES)
def test_rotations(kind, is_neox_style, vllm_config):
    rotary = rope(is_neox_style, **ROPES[kind])
    assert rotary.rotary_dim == (HEAD_SIZE // 2 if kind == "half" else HEAD_SIZE)
    check_rotation(rotary, POSITIONS)


@pytest.mark.parametrize("kind", MROPES)
def test_rotations_in_images(kind, vllm_config):
    """Time, height and width of a row; at equal ones it is the rotation of the text."""
    rotary = rope(True, **MROPES[kind])
    apart = check_rotation(rotary, torch.stack([POSITIONS, POSITIONS + 5, POSITIONS.flip(0)]))
    equal = check_rotation(rotary, POSITIONS.expand(3, -1))
    torch.testing.assert_close(equal, check_rotation(rope(True), POSITIONS), **CLOSE)
    assert not torch.allclose(apart, equal)


def test_the_rotation_of_layers(loaded):
    check_rotation(loaded[0].layers[1].rotary, POSITIONS)


@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 4.0)])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY - 3])
def test_the_head(scale, soft_cap, vocabulary, vllm_config):
    """Rows of the weight beyond the vocabulary, which vLLM pads, do not count."""
    model, attention = decoder_model("llama", vllm_config)
    assert model.lm_head.weight.shape[0] > VOCABULARY
    model.lm_head.cpu_linear = torch.nn.functional.linear
    processor = LogitsProcessor(VOCABULARY, vocabulary, scale, soft_cap=soft_cap)
    model.logits_processor = processor
    head: LanguageHead = read_decoder(model, attention).head
    x = drawn(ROWS, HIDDEN).requires_grad_()
    candidates = torch.tensor([[1, 2, 3, 3], [0, 7, vocabulary - 1, 9], [5, 4, 3, 2]])
    with torch.enable_grad():
        logits = processor(model.lm_head, x)
        assert logits.shape == (ROWS, vocabulary)
        candidates[:, 2] = likeliest = logits.argmax(-1)
        losses = -logits.log_softmax(-1).gather(1, candidates)
        want = torch.stack(
            [torch.autograd.grad(losses[:, at].sum(), x, retain_graph=True)[0] for at in range(4)],
            dim=1,
        )
    # For the likeliest candidate without the factor that its gradient has.
    rest = 1 - logits.detach().softmax(-1).gather(1, likeliest[:, None])
    want = torch.where((candidates == likeliest[:, None])[..., None], want / rest[..., None], want)
    found = head.backward(head.rows(logits.detach()), candidates)
    torch.testing.assert_close(found, want, **CLOSE)
