"""Sink tags: which prompt tokens are sinks of which layer, beside the KV cache.

A tag is a byte per (layer, cache slot). It is written when the token is computed and lives as long
as the slot's keys and values do, so that it is there for tokens that came from the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from headway.steering.head_words import KeyTag
from headway.steering.program import SinkRule

if TYPE_CHECKING:
    from headway.server.engine.step_plan import AttentionCall


@dataclass(frozen=True, eq=False)
class SinkRows:
    """Rows [start, stop) of the batch, prompt tokens of one request, whose sinks are to be found.

    layers: bool [num_layers], where they matter.
    """

    request_id: str
    rule: SinkRule
    start: int
    stop: int
    layers: np.ndarray


class SinkTags:
    """layer -> uint8 [num_blocks * block_size], made when a layer first needs it."""

    def __init__(self) -> None:
        self._tags: dict[int, torch.Tensor] = {}

    def layer(self, layer: int) -> torch.Tensor | None:
        """The tags of a layer, None if none were ever written."""
        return self._tags.get(layer)

    def write(
        self, rows: SinkRows, layer: int, flags: torch.Tensor | None, call: AttentionCall
    ) -> None:
        """Store the flags of some rows under the cache slots of their tokens.

        flags: uint8 [num_tokens]. Raises RuntimeError if the layer's residual was not observed.
        """
        if flags is None:
            raise RuntimeError(f"the residual stream entering layer {layer} was not observed")
        if layer not in self._tags:
            num_blocks, _, block_size, _ = call.kv_cache.shape
            self._tags[layer] = torch.zeros(num_blocks * block_size, dtype=torch.uint8)
        slots = call.slot_mapping[rows.start : rows.stop]
        self._tags[layer][slots] = flags[rows.start : rows.stop]


def sink_flags(
    rows: SinkRows,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    flags: torch.Tensor,
) -> None:
    """Write KeyTag.SINK into `flags` (uint8 [num_tokens]) for the rows that are sinks.

    A row x = hidden_states + residual is a sink if max over the rule's dims of |x[d]| / RMS(x) >=
    tau, with RMS(x) = sqrt(mean x^2), in float32 (VAR, arXiv 2503.03321).
    """
    span = slice(rows.start, rows.stop)
    stream = hidden_states[span].float()
    if residual is not None:
        stream = stream + residual[span].float()
    rms = stream.square().mean(dim=-1).sqrt()
    peak = stream[:, list(rows.rule.dims)].abs().amax(dim=-1)
    flags[span] = (peak >= rows.rule.tau * rms).to(torch.uint8) * int(KeyTag.SINK)
