"""Sinks: which rows of the residual stream entering a layer are sink tokens of that layer.

With x the row, D the dims of the rule and RMS(x) = sqrt(mean x^2) over the hidden size:

    sink  iff  max over d in D of |x[d]| >= tau * RMS(x)

Visual Attention Redistribution, arXiv 2503.03321: phi(x) = max_{d in D} |x[d]| / RMS(x) >= tau.
The product instead of the quotient, so that a row of zeros needs no case of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sink_flags_reference(stream: torch.Tensor, dims: Sequence[int], tau: float) -> torch.Tensor:
    """bool [num_tokens]: the rows that are sinks.

    stream: [num_tokens, hidden_size], any float dtype, the sum of hidden states and residual.
    dims: D, in [0, hidden_size); without any, no row is a sink. tau: without unit, in RMS(x).
    """
    flags = torch.zeros(stream.shape[0], dtype=torch.bool)
    for row, x in enumerate(stream.float()):
        rms = x.square().mean().sqrt()
        flags[row] = any(bool(x[d].abs() >= tau * rms) for d in dims)
    return flags
