"""Heads chosen by the prompt: what the text alone gives, and the choice made in the forward pass.

A request that selects heads is compared with a pass over its prompt without the images. That pass
is a request of its own, made by the scheduler (`text_passes.py`); the workers keep what it gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from headway.kernels.head_selection import above_median, head_statistics, without_outliers
from headway.steering.program import HeadSelection

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Joins the last dimension of a tensor over the tensor-parallel group, in the order of ranks."""

Scale = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(z, z_text, alpha) -> the scale of this rank's heads, float32 [local heads]."""


class TextRows:
    """Head outputs at the last position of a prompt without its images.

    rows: layer -> float32 [local heads, head_size], for the layers that were run.
    """

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}


@dataclass(frozen=True, eq=False)
class Capture:
    """A row of the batch to keep as `text`."""

    request_id: str
    text: TextRows
    row: int

    def read(self, layer: int, heads: torch.Tensor) -> None:
        """heads: the attention output of a layer, [num_tokens, local heads, head_size]."""
        self.text.rows[layer] = heads[self.row].float().clone()


@dataclass(eq=False)
class Choice:
    """The choice of heads for one request, made while its prompt runs.

    row: of its last prompt position in the batch. slots: whose heads are scaled. layers: those of
    the selection that this worker runs. scales: layer -> float32 [local heads], as they are chosen.
    """

    request_id: str
    selection: HeadSelection
    text: TextRows
    row: int
    slots: list[int]
    layers: frozenset[int]
    scales: dict[int, torch.Tensor] = field(default_factory=dict)

    def choose(self, layer: int, heads: torch.Tensor, scale: Scale) -> torch.Tensor:
        """The scale of every head of a layer, from its attention output before any scaling.

        Raises RuntimeError if the text alone was not run.
        """
        z = heads[self.row]
        text = self.text.rows.get(layer)
        if text is None:
            # Every rank goes through with it, or those that do would wait for the others.
            text = torch.full_like(z, torch.nan)
        chosen = scale(z, text, self.selection.alpha)
        if layer not in self.text.rows:
            raise RuntimeError(f"the prompt without its images was not run at layer {layer}")
        self.scales[layer] = chosen
        return chosen

    def result(self) -> dict[int, torch.Tensor]:
        """`scales`, after the forward pass. Raises RuntimeError if a layer did not choose."""
        if missing := self.layers - self.scales.keys():
            raise RuntimeError(f"no heads were chosen on layers {sorted(missing)}")
        return self.scales


def heads_of(scales: dict[int, torch.Tensor], own: slice) -> list[list[int]]:
    """[layer, head] of the heads that are scaled. scales: layer -> [local heads]; own: which."""
    return [
        [layer, own.start + head]
        for layer, scale in sorted(scales.items())
        for head in (scale != 1.0).nonzero().flatten().tolist()
    ]


def choose_heads(
    z: torch.Tensor, z_text: torch.Tensor, alpha: float, own: slice, gather: Gather
) -> torch.Tensor:
    """`select_heads_reference` for heads that are spread over a tensor-parallel group.

    z, z_text: [local heads, head_size]; own: the local heads among all. Returns their scale,
    float32.
    """
    divergence, activity = gather(torch.stack(head_statistics(z, z_text)))
    chosen = above_median(without_outliers(divergence, activity))
    return torch.where(chosen[own], float(alpha), 1.0)
