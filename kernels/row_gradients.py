"""The parts of a decoder layer's way back that go number by number, for a few rows on CPU.

Several losses (candidates) are differentiated at once; what the rows themselves are is shared by
them. `row_gradients.c` is compiled when Headway is installed; where it was not, torch computes the
same in more steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.compiled import compiled_library


class Turn(NamedTuple):
    """A rotary embedding at some rows: pairs (a, b) became (a cos - b sin, b cos + a sin).

    cos, sin: float32 [num_rows, half]. interleaved: whether a pair is (2i, 2i + 1) and not
    (i, half + i).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


def norm_backward(x: Tensor, grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    """dL/dx of y = x / sqrt(mean x^2 + eps) * weight over the last dimension.

    With u = x / sqrt(..), s = grad * weight:  (s - u * mean(s * u)) / sqrt(..).

    x: float32 [num_rows, ..., size]; grad: dL/dy, float32 [num_rows, num_candidates, ..., size],
    and so is the result; weight: float32 [size].
    """
    kernel = _kernel_for(x, grad, weight)
    if kernel is None:
        x = x.unsqueeze(1)
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        unit, scaled = x * inverse, grad * weight
        return (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * inverse
    x, grad, weight = x.contiguous(), grad.contiguous(), weight.contiguous()
    output = torch.empty_like(grad)
    num_rows, candidates, *heads, size = grad.shape
    call = _NormCall(
        *(each.data_ptr() for each in (x, grad, weight, output)),
        num_rows,
        candidates,
        heads[0] if heads else 1,
        size,
        eps,
    )
    kernel.headway_norm_backward(ctypes.byref(call))
    return output


def gate_backward(grad: Tensor, up: Tensor, activated: Tensor, slope: Tensor) -> Tensor:
    """dL/d(gate, up) of act(gate) * up, [num_rows, num_candidates, 2 * size].

    grad: float32 [num_rows, num_candidates, size]. up, activated, slope: float32 [num_rows, size],
    the latter act(gate) and act'(gate).
    """
    kernel = _kernel_for(grad, up, activated, slope)
    if kernel is None:
        return torch.cat([grad * (up * slope)[:, None], grad * activated[:, None]], dim=-1)
    num_rows, candidates, size = grad.shape
    grad, activated, slope = grad.contiguous(), activated.contiguous(), slope.contiguous()
    up = up if up.stride(-1) == 1 else up.contiguous()
    output = grad.new_empty(num_rows, candidates, 2 * size)
    call = _GateCall(
        *(each.data_ptr() for each in (grad, up, activated, slope, output)),
        num_rows,
        candidates,
        size,
        up.stride(0),
    )
    kernel.headway_gate_backward(ctypes.byref(call))
    return output


def turn_back(parts: Sequence[tuple[Tensor, Turn | None]]) -> Tensor:
    """The gradients of heads before they were turned, side by side.

    parts: float32 [num_rows, num_candidates, num_heads, head_size] each, and how its heads were
    turned, None where they were not. Returns [num_rows, num_candidates, sum of num_heads *
    head_size].
    """
    kernel = _kernel_for(*(grad for grad, _ in parts))
    if kernel is None:
        return torch.cat([_turned_back(grad, turn).flatten(2) for grad, turn in parts], dim=-1)
    num_rows, candidates = parts[0][0].shape[:2]
    width = sum(grad.shape[2] * grad.shape[3] for grad, _ in parts)
    output = parts[0][0].new_empty(num_rows, candidates, width)
    column = output.data_ptr()
    for grad, turn in parts:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        cos, sin = (None, None) if turn is None else (turn.cos, turn.sin)
        call = _TurnCall(
            grad.data_ptr(),
            None if cos is None else cos.data_ptr(),
            None if sin is None else sin.data_ptr(),
            column,
            *grad.stride()[:3],
            num_rows,
            candidates,
            *grad.shape[2:],
            0 if cos is None else cos.shape[-1],
            width,
            turn is not None and turn.interleaved,
        )
        kernel.headway_turn_back(ctypes.byref(call))
        column += grad.shape[2] * grad.shape[3] * grad.element_size()
    return output


def _turned_back(grad: Tensor, turn: Turn | None) -> Tensor:
    if turn is None:
        return grad
    half, result = turn.cos.shape[-1], grad.clone()
    cos, sin = turn.cos[:, None, None], turn.sin[:, None, None]
    if turn.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    low, high = grad[..., first], grad[..., second]
    result[..., first] = low * cos + high * sin
    result[..., second] = high * cos - low * sin
    return result


def _kernel_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernel if it takes these tensors: float32, on CPU, none empty."""
    taken = all(
        each.dtype is torch.float32 and each.device.type == "cpu" and each.numel()
        for each in tensors
    )
    return library() if taken else None


def library() -> ctypes.CDLL | None:
    """The compiled kernel, None if it was not built with this installation."""
    return compiled_library("row_gradients")


def _fields(pointers: str, sizes: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in pointers.split()] + [
        (name, ctypes.c_int64) for name in sizes.split()
    ]


class _NormCall(ctypes.Structure):
    """`struct norm_call` of row_gradients.c."""

    _fields_ = [
        *_fields("x grad weight output", "rows candidates heads size"),
        ("eps", ctypes.c_double),
    ]


class _GateCall(ctypes.Structure):
    """`struct gate_call` of row_gradients.c."""

    _fields_ = _fields("grad up activated slope output", "rows candidates size up_stride")


class _TurnCall(ctypes.Structure):
    """`struct turn_call` of row_gradients.c."""

    _fields_ = [
        *_fields(
            "grad cos sin output",
            "row_stride candidate_stride head_stride rows candidates heads head_size half width",
        ),
        ("interleaved", ctypes.c_int32),
    ]
