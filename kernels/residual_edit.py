"""Residual edit: a probe picks one of a few directions, which is added to the residual stream.

With x the row of the stream and rms = sqrt(mean x^2) over the hidden size:

    cluster  k = argmax over k of (W_k . x / rms + b_k)
    edit     x <- x + strength * rms * v_k

G-ACT, arXiv 2506.18887, describes the scheme: steering directions clustered from activation
differences, and a small probe per layer that picks the direction for what is in the stream. Its
abstract and first figure were all there was to go by: the norm that the probe sees, and that the
strength is in units of rms so that it means the same at every depth, are this project's choices.
"""

from __future__ import annotations

import torch


def residual_edit_reference(
    stream: torch.Tensor,
    strength: float,
    probe_weights: torch.Tensor,
    probe_bias: torch.Tensor,
    directions: torch.Tensor,
) -> torch.Tensor:
    """What one edit adds to its rows, row by row, in float32: float32 [num_rows, hidden_size].

    stream: [num_rows, hidden_size], any float dtype, the sum of hidden states and residual.
    strength: in units of the row's rms. probe_weights, directions: [num_clusters, hidden_size];
    probe_bias: [num_clusters], -inf for a cluster that is not used.

    Of equal logits the first counts. For a row of zeros, which no probe can read, nothing is added.
    """
    added = torch.zeros(stream.shape, dtype=torch.float32)
    for row, x in enumerate(stream.float()):
        rms = x.square().mean().sqrt()
        if rms > 0:
            logits = probe_weights.float() @ (x / rms) + probe_bias.float()
            added[row] = strength * rms * directions[int(logits.argmax())].float()
    return added


def residual_edit_(
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    strengths: torch.Tensor,
    probe_weights: torch.Tensor,
    probe_bias: torch.Tensor,
    directions: torch.Tensor,
) -> None:
    """Apply one edit to the given rows, all at once, on CPU; no other row is touched.

    hidden_states: [num_tokens, hidden_size], edited in place; residual: the same or None, only
    read. rows: int64 [num_rows], without repetition; strengths: float32 [num_rows]. The rest as
    for the reference. Arithmetic is float32, rounded once when hidden_states is written.
    """
    before = hidden_states[rows].float()
    stream = before if residual is None else before + residual[rows].float()
    rms = stream.square().mean(dim=-1, keepdim=True).sqrt()
    logits = torch.addmm(
        probe_bias, stream / rms.clamp_min(torch.finfo(torch.float32).tiny), probe_weights.T
    )
    chosen = directions[logits.argmax(dim=-1)]
    edited = torch.addcmul(before, strengths[:, None] * rms, chosen)
    hidden_states[rows] = edited.to(hidden_states.dtype)
