"""Saliency row: how much each key matters to a loss through one query's attention.

For the query at the last position, head h and key j, with z_h = sum_j A[h, j] v_j:

    saliency[j] = sum over h of | A[h, j] * dL/dA[h, j] |,    dL/dA[h, j] = dL/dz_h . v_j

Saliency-Guided Rejection Sampling, arXiv 2601.20279: S = |A * dLoss/dA|, of which this is one row,
that of the token whose logits a candidate is drawn from, summed over the heads. The paper divides
by the norm of the sums, which is left to the caller.
"""

from __future__ import annotations

import torch


def saliency_row_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """The rows of all candidates of one sequence, float32 [num_candidates, num_keys], by autograd.

    query: [num_heads, head_size], of the last position, which attends to all keys.
    key, value: [num_keys, num_kv_heads, head_size]. Any float dtype; the arithmetic is float32.
    grad_output: [num_candidates, num_heads, head_size], dL/dz for the loss of each candidate.
    """
    group = query.shape[0] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    values = value.float().repeat_interleave(group, dim=1)
    logits = softmax_scale * torch.einsum("hd,jhd->hj", query.float(), keys)
    weights = torch.softmax(logits, dim=-1).requires_grad_()
    z = torch.einsum("hj,jhd->hd", weights, values)
    rows = []
    for grad in grad_output.float():
        (grad_weights,) = torch.autograd.grad((grad * z).sum(), weights, retain_graph=True)
        rows.append((weights.detach() * grad_weights).abs().sum(dim=0))
    return torch.stack(rows)
