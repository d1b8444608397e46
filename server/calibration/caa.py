"""Directions of CAA, Contrastive Activation Addition (arXiv 2312.06681), from pairs.

At each layer, with h the residual stream where a continuation is read (the paper reads at an
answer's last token; see `activations.Reading`),

    v = mean over pairs of (h(prompt + wanted) - mean over the unwanted of h(prompt + other))

not normalised, as in the paper: strength 1 moves the stream by the mean difference itself.

How well a direction tells wanted from unwanted is judged on pairs held out, fold by fold: the share
of pairs whose own difference has a positive component along the v of the other folds, and how many
standard deviations the mean of these components is away from zero.

Which layer: the paper steers one, in the middle of the model. Unless layers are named, it is here
the one of the middle third whose direction separates most of the held-out pairs, of equals the one
by the most standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headway.server.calibration.held_out import wilson
from headway.server.calibration.tables import columns
from headway.steering.vectors import VectorHeader, VectorProfile


@dataclass(frozen=True)
class Separation:
    """separated: bool [num_layers, num_pairs], of pairs held out; margins: by layer, in standard
    deviations; norms: |v| by layer."""

    separated: np.ndarray
    margins: np.ndarray
    norms: np.ndarray


def middle_third(num_layers: int) -> range:
    """The third of the layers in the middle; of few layers at least one."""
    first = num_layers // 3
    return range(first, max(first + 1, num_layers - first))


def separation(differences: np.ndarray, folds: np.ndarray) -> Separation:
    """Judge the directions of all layers; differences: d, [num_pairs, num_layers, hidden_size]."""
    exact = differences.astype(np.float64)
    along = np.zeros(exact.shape[:2])
    for fold in np.unique(folds):
        direction = exact[folds != fold].mean(axis=0)
        norm = np.linalg.norm(direction, axis=-1, keepdims=True)
        unit = direction / np.maximum(norm, np.finfo(np.float64).tiny)
        along[folds == fold] = np.einsum("plh,lh->pl", exact[folds == fold], unit)
    spread = np.maximum(along.std(axis=0), np.finfo(np.float64).tiny)
    norms = np.linalg.norm(exact.mean(axis=0), axis=-1)
    return Separation((along > 0).T, along.mean(axis=0) / spread, norms)


def choose_layer(found: Separation) -> tuple[int, ...]:
    """The layer to steer where none is named, alone in a tuple."""
    shares = found.separated.mean(axis=1)
    layers = middle_third(len(shares))
    return (max(layers, key=lambda layer: (shares[layer], found.margins[layer])),)


def make_profile(
    header: VectorHeader, differences: np.ndarray, normalize: bool = False
) -> VectorProfile:
    """The profile of the header's layers; differences as for `separation`.

    normalize: scale every direction to length 1. Raises ValueError for a direction of zeros then.
    """
    directions = differences.astype(np.float64).mean(axis=0)[list(header.layers)]
    if normalize:
        norms = np.linalg.norm(directions, axis=-1, keepdims=True)
        if not norms.all():
            raise ValueError("wanted and unwanted continuations leave the same residual stream")
        directions = directions / norms
    return VectorProfile(header, {"directions": directions[:, None].astype(np.float32)})


def table(found: Separation, stream_norms: np.ndarray, chosen: Sequence[int]) -> str:
    """The layers for people, the chosen ones marked; stream_norms: mean |h| at prompts' ends."""
    rows = [("layer", "separated", "95 %", "margin", "|v|", "of |h|")]
    for layer, hits in enumerate(found.separated):
        interval = wilson(hits)
        rows.append(
            (
                f"{'*' if layer in chosen else ''}{layer}",
                f"{interval.value:.3f}",
                f"{interval.low:.2f} .. {interval.high:.2f}",
                f"{found.margins[layer]:.2f}",
                f"{found.norms[layer]:.3g}",
                f"{found.norms[layer] / stream_norms[layer]:.0%}",
            )
        )
    return columns(rows)
