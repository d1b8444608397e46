"""Residual edit: a probe picks one of a few directions, which is added to the residual stream.

With x the row of the stream and rms = sqrt(mean x^2) over the hidden size:

    cluster      k = argmax over k of (W_k . x / rms + b_k)
    RMS          x <- x + strength * rms * v_k
    ADD          x <- x + strength * v_k
    REMOVE       x <- x - strength * (x . v_k) / (v_k . v_k) * v_k

G-ACT, arXiv 2506.18887, describes the scheme: steering directions clustered from activation
differences, and a small probe per layer that picks the direction for what is in the stream. Its
abstract and first figure were all there was to go by: the norm that the probe sees, and that the
strength is in units of rms so that it means the same at every depth, are this project's choices.
ADD is contrastive activation addition (arXiv 2312.06681), REMOVE directional ablation (2406.11717).

`residual_edit.c` is compiled when Headway is installed; where it was not, and for float16, torch
computes the same, edit by edit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from headway.kernels.compiled import compiled_library


class Form(IntEnum):
    """What an edit does to a row."""

    RMS = 0
    ADD = 1
    REMOVE = 2


def residual_edit_reference(
    stream: torch.Tensor,
    strength: float,
    probe_weights: torch.Tensor,
    probe_bias: torch.Tensor,
    directions: torch.Tensor,
    form: Form = Form.RMS,
) -> torch.Tensor:
    """What one edit adds to its rows, row by row, in float32: float32 [num_rows, hidden_size].

    stream: [num_rows, hidden_size], any float dtype, the sum of hidden states and residual.
    strength: in units of the row's rms. probe_weights, directions: [num_clusters, hidden_size];
    probe_bias: [num_clusters], -inf for a cluster that is not used.

    Of equal logits the first counts. Of a row of zeros the probe reads zeros.
    """
    added = torch.zeros(stream.shape, dtype=torch.float32)
    for row, x in enumerate(stream.float()):
        rms = x.square().mean().sqrt()
        unit = x / rms if rms > 0 else x
        logits = probe_weights.float() @ unit + probe_bias.float()
        v = directions[int(logits.argmax())].float()
        if form is Form.RMS:
            added[row] = strength * rms * v
        elif form is Form.ADD:
            added[row] = strength * v
        elif v.any():
            added[row] = -strength * (x @ v) / (v @ v) * v
    return added


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit, as rows are given it; all on CPU and float32.

    directions, probe_weights: [num_clusters, hidden_size]; probe_bias: [num_clusters]. Without a
    probe (None) the first direction is always taken.
    """

    directions: torch.Tensor
    strength: float
    form: Form = Form.RMS
    probe_weights: torch.Tensor | None = None
    probe_bias: torch.Tensor | None = None


class RowEdits:
    """Which rows get which edits, as `residual_edit.c` finds them; keeps their tensors alive.

    rows: int64 [num_rows], without repetition; which: int64 [num_rows], index of each row's edit
    among `edits`. Made once for many steps, since preparing a call takes as long as the edit.
    """

    def __init__(self, rows: torch.Tensor, which: torch.Tensor, edits: Sequence[Edit]) -> None:
        self.rows, self.which, self.edits = rows.contiguous(), which.contiguous(), tuple(edits)
        self._entries = (_Entry * len(self.edits))(*map(_entry, self.edits))
        self.call = _Call(
            rows=self.rows.data_ptr(),
            which=self.which.data_ptr(),
            edits=ctypes.addressof(self._entries),
            num_rows=len(self.rows),
        )


def residual_edit_(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, edits: RowEdits
) -> None:
    """Apply to each of the given rows its edit, on CPU; no other row is touched.

    hidden_states: [num_tokens, hidden_size], edited in place; residual: the same or None, only
    read. Arithmetic is float32, rounded once when hidden_states is written.
    """
    kernel = compiled_library("residual_edit")
    known = hidden_states.dtype in (torch.float32, torch.bfloat16)
    dense = hidden_states.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    if kernel is None or not known or not dense:
        for index, edit in enumerate(edits.edits):
            _edit_rows(hidden_states, residual, edits.rows[edits.which == index], edit)
        return
    call = edits.call
    call.hidden, call.size = hidden_states.data_ptr(), hidden_states.shape[1]
    call.hidden_stride = hidden_states.stride(0)
    call.residual = None if residual is None else residual.data_ptr()
    call.residual_stride = 0 if residual is None else residual.stride(0)
    call.bf16 = hidden_states.dtype is torch.bfloat16
    kernel.headway_residual_edit(ctypes.byref(call))


def _edit_rows(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, rows: torch.Tensor, edit: Edit
) -> None:
    before = hidden_states[rows].float()
    stream = before if residual is None else before + residual[rows].float()
    rms = stream.square().mean(dim=-1, keepdim=True).sqrt()
    chosen = edit.directions[:1]
    if edit.probe_weights is not None and edit.probe_bias is not None:
        unit = stream / rms.clamp_min(torch.finfo(torch.float32).tiny)
        logits = torch.addmm(edit.probe_bias, unit, edit.probe_weights.T)
        chosen = edit.directions[logits.argmax(dim=-1)]
    if edit.form is Form.RMS:
        amount = edit.strength * rms
    elif edit.form is Form.ADD:
        amount = torch.full_like(rms, edit.strength)
    else:
        square = chosen.square().sum(dim=-1, keepdim=True)
        along = (stream * chosen).sum(dim=-1, keepdim=True)
        amount = -edit.strength * torch.where(square > 0, along / square, 0.0)
    hidden_states[rows] = torch.addcmul(before, amount, chosen).to(hidden_states.dtype)


class _Entry(ctypes.Structure):
    """`struct edit` of residual_edit.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("directions", "weights", "bias")),
        ("clusters", ctypes.c_int64),
        ("strength", ctypes.c_float),
        ("form", ctypes.c_int32),
    )


class _Call(ctypes.Structure):
    """`struct call` of residual_edit.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "residual", "rows", "which", "edits")),
        *((name, ctypes.c_int64) for name in ("num_rows", "size", "hidden_stride")),
        ("residual_stride", ctypes.c_int64),
        ("bf16", ctypes.c_int32),
    )


def _entry(edit: Edit) -> _Entry:
    tensors = [edit.directions, edit.probe_weights, edit.probe_bias]
    if any(each is not None and not each.is_contiguous() for each in tensors):
        raise ValueError("the vectors of an edit must be contiguous")
    pointers = (None if each is None else each.data_ptr() for each in tensors)
    return _Entry(*pointers, len(edit.directions), edit.strength, edit.form)
