"""Seam: the parts of vLLM's decoder layers that a saliency pass goes back through.

vLLM symbols relied on: in a decoder layer `input_layernorm`, `post_attention_layernorm`,
`pre_feedforward_layernorm`, `post_feedforward_layernorm`, `ada_rms_norm_t_cond`, `self_attn`
(`qkv_proj`, `o_proj`, `q_norm`, `k_norm`, `rotary_emb`, `do_llama_4_scaling`), `mlp`
(`gate_up_proj`, `down_proj`, `act_fn`); `RMSNorm` and `GemmaRMSNorm` (`weight`,
`variance_epsilon`, `variance_size_override`), `SiluAndMul`, `GeluAndMul` (`approximate`), rotary
embeddings' `forward_native`, `head_size`, `rotary_dim`, `is_neox_style`; of the model
`lm_head.weight` and `logits_processor` (`scale`, `soft_cap`).

Llama, Mistral, Qwen2, Qwen3 and Gemma-3 are made of these, and so are the language parts of models
with images around them. A layer made of anything else is refused by the name of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.models.utils import extract_layer_index

from headway.kernels.linear_grad import linear_grad
from headway.kernels.row_gradients import Turn, norm_backward
from headway.server.engine.kept_weights import weight_of


class UnknownStructureError(ValueError):
    """A model that a saliency pass does not know how to go back through."""


@dataclass(frozen=True)
class Norm:
    """y = x / sqrt(mean x^2 + eps) * weight, over the last dimension; float32.

    module: of vLLM, None where it is not needed.
    """

    weight: torch.Tensor
    eps: float
    module: Any = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of float32 [..., size]."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    def backward(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """dL/dx from dL/dy [num_rows, num_candidates, .., size]; x: [num_rows, .., size]."""
        return norm_backward(x, grad, self.weight, self.eps)


@dataclass(frozen=True)
class Linear:
    """A linear layer of vLLM: its own forward, and the way back."""

    module: Any
    weight: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [num_rows, out_features] of float [num_rows, in_features]."""
        out = self.module(x)
        return (out[0] if isinstance(out, tuple) else out).float()

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """dL/dx, float32 [..., in_features], from dL/dy [..., out_features]."""
        rows = grad.reshape(-1, grad.shape[-1])
        return linear_grad(rows, self.weight).view(*grad.shape[:-1], -1)


def turn_of(rotary: Any, positions: torch.Tensor, dtype: torch.dtype) -> Turn:
    """What a rotary embedding, whichever kind, does to rows, read off by turning unit vectors.

    It is linear, so that its transpose is all a gradient needs. positions: int64 [num_rows], or [3,
    num_rows] with M-RoPE.
    """
    half, interleaved = rotary.rotary_dim // 2, not rotary.is_neox_style
    unit = torch.zeros(positions.shape[-1], rotary.head_size, dtype=dtype)
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    unit[:, first] = 1
    turned, _ = rotary.forward_native(positions, unit, unit.clone())
    cos, sin = (turned[:, each].float().contiguous() for each in (first, second))
    return Turn(cos, sin, interleaved)


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer.

    attention_norm, feedforward_norm: of what the residual branch takes; after_attention,
    after_feedforward: of what it gives back, in models that have such. query_norm, key_norm: per
    head, before the rotation. activation: of the gate, and its derivative.
    """

    index: int
    attention_norm: Norm
    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    rotary: Any
    output: Linear
    after_attention: Norm | None
    feedforward_norm: Norm
    gate_up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]
    down: Linear
    after_feedforward: Norm | None


class HeadRows(NamedTuple):
    """What some rows have at the head, whatever the candidates: see `LanguageHead.backward`.

    likeliest: int64 [num_rows, 1], m. rest: float32 [num_rows, 1, 1], r. others, top: float32
    [num_rows, 1, size], the head's gradient of q, and of m alone. slope: float32 [num_rows,
    vocabulary], of the logits by the raw ones, None if it is 1.
    """

    likeliest: torch.Tensor
    rest: torch.Tensor
    others: torch.Tensor
    top: torch.Tensor
    slope: torch.Tensor | None

    def of(self, chosen: torch.Tensor) -> HeadRows:
        """Those of some of the rows."""
        likeliest, rest, others, top = (each.index_select(0, chosen) for each in self[:4])
        slope = None if self.slope is None else self.slope.index_select(0, chosen)
        return HeadRows(likeliest, rest, others, top, slope)


@dataclass(frozen=True)
class LanguageHead:
    """From the residual stream after the last layer to the logits."""

    norm: Norm
    weight: torch.Tensor
    scale: float
    soft_cap: float | None

    def rows(self, logits: torch.Tensor) -> HeadRows:
        """logits: float32 [num_rows, vocabulary], the model's own."""
        weight = self.weight[: logits.shape[-1]]
        likeliest = logits.argmax(dim=-1, keepdim=True)
        others = logits.scatter(1, likeliest, -torch.inf)
        rest = torch.exp(others.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True))
        share, top, slope = torch.softmax(others, dim=-1), weight[likeliest].float(), None
        if self.scale != 1.0 or self.soft_cap is not None:
            slope = torch.full_like(logits, self.scale)
            if self.soft_cap is not None:
                slope *= 1 - (logits / (self.scale * self.soft_cap)).square()
            share *= slope
            top *= slope.gather(1, likeliest).unsqueeze(-1)
        mixed = linear_grad(share, weight).unsqueeze(1)
        return HeadRows(likeliest, rest.unsqueeze(-1), mixed, top, slope)

    def backward(self, rows: HeadRows, candidates: torch.Tensor) -> torch.Tensor:
        """dL/d(normed stream), L = -log p(candidate), float32 [num_rows, num_candidates, size].

        Up to a positive factor for each candidate, on which saliencies do not depend. candidates:
        int64 [num_rows, num_candidates].

        dL/dlogits = p - onehot, a difference that rounding eats where p is almost 1. So the
        likeliest token m is kept apart: with q the softmax of all others and r their part of p,
        dL/dlogits is r * q + (1 - r) * onehot(m) - onehot(c), and r * (q - onehot(m)) for m itself,
        from which the factor r is left out.
        """
        likeliest, rest, others, top, slope = rows
        row = self.weight[candidates].float()
        if slope is not None:
            row *= slope.gather(1, candidates).unsqueeze(-1)
        of_others = rest * others + (1 - rest) * top - row
        return torch.where((candidates == likeliest).unsqueeze(-1), others - top, of_others)


@dataclass(frozen=True)
class Decoder:
    """All decoder layers of a model, by index, and its head."""

    layers: dict[int, DecoderLayer]
    head: LanguageHead


def read_decoder(model: torch.nn.Module, attention_layers: dict[str, Any]) -> Decoder:
    """The parts of a loaded model.

    attention_layers: layer name -> attention module of its decoder. Raises UnknownStructureError
    that names the module.
    """
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    layers, parents = {}, set()
    for name, attention in attention_layers.items():
        index = extract_layer_index(name)
        path = paths.get(id(attention), name).split(".")
        if str(index) not in path:
            raise UnknownStructureError(f"{name} is not in a list of layers")
        at = path.index(str(index))
        layers[index] = _layer(index, modules[".".join(path[: at + 1])])
        parents.add(".".join(path[: at - 1]))
    if len(parents) != 1:
        raise UnknownStructureError(f"the decoder layers are in {sorted(parents)}")
    head = next((each for each in modules.values() if _has(each, "lm_head", "logits_processor")), 0)
    if not isinstance(head, torch.nn.Module):
        raise UnknownStructureError("there is no lm_head")
    processor: Any = head.logits_processor
    norm = _norm(modules[parents.pop()], "norm")
    weight: Any = getattr(head.lm_head, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.dim() != 2:
        raise UnknownStructureError("lm_head has no weight of floats")
    return Decoder(layers, LanguageHead(norm, weight.data, processor.scale, processor.soft_cap))


def _has(module: Any, *names: str) -> bool:
    return all(getattr(module, name, None) is not None for name in names)


def _layer(index: int, layer: Any) -> DecoderLayer:
    attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
    if getattr(layer, "ada_rms_norm_t_cond", None) is not None:
        raise UnknownStructureError(f"{type(layer).__name__} has an ada_rms_norm_t_cond")
    if getattr(attention, "do_llama_4_scaling", False):
        raise UnknownStructureError(f"{type(attention).__name__} scales queries (llama_4_scaling)")
    four_norms = _has(layer, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    before = "pre_feedforward_layernorm" if four_norms else "post_attention_layernorm"
    activation, slope = _activation(_child(mlp, "act_fn"))
    has_head_norms = _has(attention, "q_norm", "k_norm")
    return DecoderLayer(
        index,
        _norm(layer, "input_layernorm"),
        _linear(attention, "qkv_proj"),
        _norm(attention, "q_norm") if has_head_norms else None,
        _norm(attention, "k_norm") if has_head_norms else None,
        _child(attention, "rotary_emb"),
        _linear(attention, "o_proj"),
        _norm(layer, "post_attention_layernorm") if four_norms else None,
        _norm(layer, before),
        _linear(mlp, "gate_up_proj"),
        activation,
        slope,
        _linear(mlp, "down_proj"),
        _norm(layer, "post_feedforward_layernorm") if four_norms else None,
    )


def _child(module: Any, name: str) -> Any:
    child = getattr(module, name, None)
    if child is None:
        raise UnknownStructureError(f"{type(module).__name__} has no {name}")
    return child


def _norm(module: Any, name: str) -> Norm:
    norm = _child(module, name)
    if isinstance(norm, GemmaRMSNorm):
        return Norm(norm.weight.data.float() + 1.0, norm.variance_epsilon, norm)
    if isinstance(norm, RMSNorm) and norm.variance_size_override is None and norm.has_weight:
        return Norm(norm.weight.data.float(), norm.variance_epsilon, norm)
    raise UnknownStructureError(f"{type(module).__name__}.{name} is a {type(norm).__name__}")


def _linear(module: Any, name: str) -> Linear:
    linear = _child(module, name)
    method = getattr(linear, "quant_method", None)
    if not isinstance(linear, LinearBase) or not isinstance(method, UnquantizedLinearMethod):
        kind = f"a {type(linear).__name__} with {type(method).__name__}"
        raise UnknownStructureError(f"{type(module).__name__}.{name} is {kind}")
    return Linear(linear, weight_of(linear))


def _activation(module: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if isinstance(module, SiluAndMul):
        return torch.nn.functional.silu, lambda x: torch.ops.aten.silu_backward(
            torch.ones_like(x), x
        )
    if isinstance(module, GeluAndMul):
        kind = module.approximate
        return lambda x: torch.nn.functional.gelu(
            x, approximate=kind
        ), lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=kind)
    raise UnknownStructureError(f"the activation is a {type(module).__name__}")
