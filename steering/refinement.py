"""Refining the probes of a gact profile with feedback on answers that it steered.

G-ACT (arXiv 2506.18887) says of its probes that gradient steps refine them while a model is served.
Abstract and first figure, all there was to go by, tell neither loss nor step; the following is
Headway's own reconstruction.

With x a row of the residual stream at the last prompt token, n = x / rms(x), H its size, and the
probe of a layer p = softmax(z), z = W n + b, a piece of feedback is one gradient step per layer on

    label k            -log p_k          dL/dz_j = p_j - [j = k]
    preferred          -log p_c          the same for k = c, the cluster that the probe picked
    not preferred      -log(1 - p_c)     dL/dz_c = p_c,   dL/dz_j = -p_c p_j / (1 - p_c) for j != c

    W <- W - rate / H * dL/dz n^T        b <- b - rate * dL/dz

which is plain gradient descent on sqrt(H) W, the weights for rows of unit length, and on b. As
|n|^2 = H, a step changes each logit of the row that it is for by 2 * rate at most, and by the same
for every model and depth. Steps are taken in the order of the feedback, each where the one before
it ended. Arithmetic is float64, rounded to float32 once at the end: the same feedback on the same
profile gives the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from headway.steering.vectors import VectorProfile


@dataclass(frozen=True, eq=False)
class ProbeReading:
    """What the probes of a profile read at the last prompt position of a request.

    layers: some of the profile's. rows: float32 [num_layers, hidden_size], n of each; clusters:
    what the probe of each picked.
    """

    layers: tuple[int, ...]
    rows: np.ndarray
    clusters: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Feedback:
    """A verdict on what was read: the cluster that was wanted, or whether the picked ones were."""

    reading: ProbeReading
    label: int | None = None
    preferred: bool = True

    def gradient(self, logits: np.ndarray, index: int) -> np.ndarray:
        """dL/dz for the layer of an index: float64 [num_clusters]; logits: z, likewise."""
        picked = self.reading.clusters[index]
        if self.label is None and not self.preferred:
            return unlikely_gradient(logits, picked)
        return likely_gradient(logits, picked if self.label is None else self.label)


def likely_gradient(logits: np.ndarray, cluster: int) -> np.ndarray:
    """dL/dz of L = -log softmax(z)[cluster]; logits: z, float64 [num_clusters]."""
    gradient = _softmax(logits)
    gradient[cluster] -= 1.0
    return gradient


def unlikely_gradient(logits: np.ndarray, cluster: int) -> np.ndarray:
    """dL/dz of L = -log(1 - softmax(z)[cluster]); logits: z, float64 [num_clusters >= 2].

    p_j / (1 - p_c) is the softmax of the others among themselves, finite where p_c rounds to 1 too.
    """
    others = np.arange(len(logits)) != cluster
    likely = _softmax(logits)[cluster]
    gradient = np.empty_like(logits)
    gradient[cluster] = likely
    gradient[others] = -likely * _softmax(logits[others])
    return gradient


def refined(
    profile: VectorProfile,
    feedback: Sequence[Feedback],
    rate: float,
    training: Mapping[str, Any] = MappingProxyType({}),
) -> VectorProfile:
    """A gact profile with its probes refined; its directions and all else stay.

    rate: the learning rate. training: facts that are added to those of its header.

    Raises ValueError for feedback on a layer that the profile has not, IndexError for a cluster.
    """
    layers = profile.header.layers
    weights = profile.tensors["probe_weights"].astype(np.float64)
    bias = profile.tensors["probe_bias"].astype(np.float64)
    for each in feedback:
        for index, layer in enumerate(each.reading.layers):
            at, row = layers.index(layer), each.reading.rows[index].astype(np.float64)
            gradient = each.gradient(weights[at] @ row + bias[at], index)
            weights[at] -= rate / len(row) * np.outer(gradient, row)
            bias[at] -= rate * gradient
    probes = {
        "probe_weights": weights.astype(np.float32),
        "probe_bias": bias.astype(np.float32),
    }
    facts = {**profile.header.training, **training}
    header = profile.header.model_copy(update={"training": facts})
    return VectorProfile(header, {**profile.tensors, **probes})


def same_clusters(one: VectorProfile, other: VectorProfile) -> bool:
    """Whether feedback on one gact profile means the same for the probes of another.

    That is so for those that differ in their probes alone, as a profile and its refinements do.
    """
    return (
        one.header.layers == other.header.layers
        and one.header.site == other.header.site
        and np.array_equal(one.tensors["directions"], other.tensors["directions"])
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    probabilities: np.ndarray = powers / powers.sum()
    return probabilities
