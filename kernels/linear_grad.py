"""The gradient of a linear layer with respect to its input, for a few rows on CPU.

For y = x W^T that is grad @ W, a product that meets W across its rows. `linear_grad.c`, compiled
when Headway is installed, reads W once as it is stored: torch multiplies by a float32 W, twice the
bytes, and is an order slower by a bfloat16 W where the CPU has no instructions for it.
"""

from __future__ import annotations

import ctypes

import torch

from headway.kernels.compiled import compiled_library

FALLBACK_BYTES = 8 << 20
"""How much of the weight is widened at a time where the kernel is not built."""


class LinearGradError(RuntimeError):
    """The kernel was called with tensors it cannot take, or memory ran out."""


def linear_grad(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad @ weight, [num_rows, in_features] float32, summed in float32 on CPU.

    grad: float32 [num_rows, out_features]. weight: [out_features, in_features], float32, bfloat16
    or float16, with adjacent numbers in a row; rows may lie apart.

    With the kernel, the result of a row has the same bits whatever the other rows are, and whatever
    the number of threads. Where it was not built, and on other devices, torch multiplies: that
    holds only as far as torch warrants it. On other devices the factors have the dtype of `weight`.

    Raises LinearGradError for tensors that do not fit; nothing is computed then.
    """
    _check(grad, weight)
    if weight.device.type != "cpu":
        return (grad.to(weight.dtype) @ weight).float()
    kernel = library()
    if kernel is None or not grad.numel() or not weight.numel():
        return _widened_in_parts(grad, weight)
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    output = grad.new_empty(len(grad), weight.shape[1])
    call = _Call(
        grad=grad.data_ptr(),
        weight=weight.data_ptr(),
        output=output.data_ptr(),
        grad_stride=grad.stride(0),
        weight_stride=weight.stride(0),
        output_stride=output.stride(0),
        num_rows=len(grad),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=_DTYPES[weight.dtype],
    )
    if kernel.headway_linear_grad(ctypes.byref(call)):
        raise LinearGradError("no memory for the kernel of linear gradients")
    return output


def library() -> ctypes.CDLL | None:
    """The compiled kernel, None if it was not built with this installation."""
    return compiled_library("linear_grad")


def _widened_in_parts(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    output = grad.new_zeros(len(grad), weight.shape[1])
    part = max(1, FALLBACK_BYTES // (4 * max(1, weight.shape[1])))
    for first in range(0, len(weight), part):
        output.addmm_(grad[:, first : first + part], weight[first : first + part].float())
    return output


def _check(grad: torch.Tensor, weight: torch.Tensor) -> None:
    if grad.dtype is not torch.float32 or weight.dtype not in _DTYPES:
        raise LinearGradError(
            "the gradient must be float32 and the weight float32, bfloat16 or float16; "
            f"got {grad.dtype} and {weight.dtype}"
        )
    if grad.device != weight.device:
        raise LinearGradError("gradient and weight must be on one device")
    if grad.ndim != 2 or weight.ndim != 2 or grad.shape[1] != weight.shape[0]:
        raise LinearGradError(
            "the gradient must have a number for every row of the weight; "
            f"got {list(grad.shape)} and {list(weight.shape)}"
        )
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise LinearGradError("the numbers in a row of the weight must be adjacent")


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Weights that can be taken, and the number that linear_grad.c knows a dtype by."""


class _Call(ctypes.Structure):
    """`struct call` of linear_grad.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "weight", "output")),
        *((name, ctypes.c_int64) for name in ("grad_stride", "weight_stride", "output_stride")),
        *((name, ctypes.c_int64) for name in ("num_rows", "out_features", "in_features")),
        ("dtype", ctypes.c_int32),
    )
