"""Directions and probes of G-ACT (arXiv 2506.18887), from pairs.

At one layer, with h the residual stream, read at all tokens of a continuation on average or at its
last (`activations.Reading`), for each prompt i

    d_i = h(prompt_i + wanted continuation) - mean over the unwanted ones of h(prompt_i + other)

k-means over d gives num_clusters centroids c_k and the directions v_k = c_k / |c_k|; the cluster of
a prompt is that of its d, or, of a prompt that was held out, the centroid nearest to its d. A probe
(`headway.server.calibration.probes`) reads h(prompt_i), at the prompt's last token, and tells the
cluster: what the continuation would show must be told before there is one.

The paper's abstract and first figure were all there was to go by: they establish the clustered
differences, the probe per layer, its refinement by gradient steps and that a subset of the layers
is steered. The rest is this project's.

Probes are judged on prompts held out: fold by fold, directions and probes come from the other folds
alone. Then the profile is fitted on all prompts. scikit-learn is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from headway.server.calibration.probes import act_predictions, fit_probe, normalized, refine
from headway.steering.vectors import VectorHeader, VectorProfile

RESTARTS = 10
"""How often k-means begins anew; the best run counts."""


@dataclass(frozen=True)
class Clusters:
    """centroids: float64 [num_clusters, hidden_size], of the largest cluster first; labels: int64
    [num_prompts], the cluster of each prompt."""

    centroids: np.ndarray
    labels: np.ndarray

    @property
    def directions(self) -> np.ndarray:
        """v_k, unit vectors: float64 [num_clusters, hidden_size]."""
        return self.centroids / np.linalg.norm(self.centroids, axis=1, keepdims=True)

    @property
    def sizes(self) -> list[int]:
        """Prompts in each cluster."""
        return np.bincount(self.labels, minlength=len(self.centroids)).tolist()

    def nearest(self, differences: np.ndarray) -> np.ndarray:
        """The cluster whose centroid is nearest to each d: int64 [num_rows]."""
        apart = differences[:, None].astype(np.float64) - self.centroids
        return np.square(apart).sum(axis=-1).argmin(axis=1)


@dataclass(frozen=True)
class HeldOut:
    """What was found of prompts held out, bool [num_layers, num_prompts] each.

    majority: the cluster is the largest of the training prompts; act, plain, refined: that which
    ACT's probes, the logistic probe, the refined probe told. separated: d has a positive component
    along the direction that the refined probe picks, so that it tells wanted from unwanted.
    """

    majority: np.ndarray
    act: np.ndarray
    plain: np.ndarray
    refined: np.ndarray
    separated: np.ndarray

    @property
    def gains(self) -> np.ndarray:
        """Accuracy of the refined probe above the majority's, by layer."""
        return self.refined.mean(axis=1) - self.majority.mean(axis=1)


@dataclass(frozen=True)
class LayerFit:
    """One layer of a profile; sizes: prompts by cluster; epochs: how long its probe was refined.

    directions, probe_weights: float32 [num_clusters, hidden_size]; probe_bias: [num_clusters].
    """

    directions: np.ndarray
    probe_weights: np.ndarray
    probe_bias: np.ndarray
    sizes: list[int]
    epochs: int


def cluster(differences: np.ndarray, num_clusters: int, seed: int) -> Clusters:
    """k-means over d, [num_prompts, hidden_size].

    Raises ValueError where a centroid is zero and so has no direction.
    """
    exact = differences.astype(np.float64)
    found = KMeans(num_clusters, n_init=RESTARTS, random_state=seed).fit(exact)
    counts = np.bincount(found.labels_, minlength=num_clusters)
    order = np.argsort(-counts, kind="stable")
    centroids = found.cluster_centers_[order]
    if not np.linalg.norm(centroids, axis=1).all():
        raise ValueError("wanted and unwanted continuations leave the same residual stream")
    return Clusters(centroids, np.argsort(order)[found.labels_])


def cluster_layers(differences: np.ndarray, num_clusters: int, seed: int) -> list[np.ndarray]:
    """The cluster of each prompt at each layer; d: [num_prompts, num_layers, hidden_size]."""
    with threadpool_limits(1):
        by_layer = differences.swapaxes(0, 1)
        return [cluster(each, num_clusters, seed).labels for each in by_layer]


def evaluate(
    prompts: np.ndarray, differences: np.ndarray, folds: np.ndarray, num_clusters: int, seed: int
) -> HeldOut:
    """Judge the probes of every layer on prompts held out.

    prompts: h(prompt_i); differences: d_i, [num_prompts, num_layers, hidden_size] both. folds: in
    which fold each prompt is held out, [num_prompts]. Raises ValueError as the parts do.
    """
    layers = []
    # Matrices this small are slower on several threads.
    with threadpool_limits(1):
        for layer in tqdm(range(prompts.shape[1]), desc="probes", unit="layer"):
            rows, d = prompts[:, layer], differences[:, layer]
            layers.append(_evaluate_layer(rows, d, folds, num_clusters, seed))
    return HeldOut(
        *(np.stack([getattr(layer, field.name) for layer in layers]) for field in fields(HeldOut))
    )


def choose_layers(found: HeldOut, num_layers: int) -> tuple[int, ...]:
    """The layers of the highest accuracy above the majority's, at most `num_layers`, ascending.

    Layers without such a gain are left out, but for one cluster, where there is nothing to tell;
    of equal gain are those first whose directions separate more prompts, then the lower ones.
    """
    gains, separation = found.gains, found.separated.mean(axis=1)
    trivial = bool(found.majority.all())
    usable = [layer for layer in range(len(gains)) if trivial or gains[layer] > 0]
    usable.sort(key=lambda layer: (-gains[layer], -separation[layer], layer))
    return tuple(sorted(usable[:num_layers]))


def explain_none(found: HeldOut) -> str:
    """Why `choose_layers` found none."""
    best = int(found.gains.argmax())
    return (
        "no layer's probe tells the clusters of held-out prompts better than the largest cluster "
        f"alone: at best {found.refined[best].mean():.2f} in layer {best}, against "
        f"{found.majority[best].mean():.2f}; try other --clusters or more pairs, or name --layers"
    )


def fit_layer(
    prompts: np.ndarray, differences: np.ndarray, num_clusters: int, seed: int
) -> LayerFit:
    """One layer of a profile, of all prompts: h(prompt_i) and d_i, [num_prompts, hidden_size]."""
    with threadpool_limits(1):
        clusters = cluster(differences, num_clusters, seed)
        probe, epochs = refine(normalized(prompts), clusters.labels, num_clusters, seed)
    return LayerFit(
        clusters.directions.astype(np.float32),
        probe.weights.astype(np.float32),
        probe.bias.astype(np.float32),
        clusters.sizes,
        epochs,
    )


def make_profile(header: VectorHeader, fits: Sequence[LayerFit]) -> VectorProfile:
    """The profile of these layers, which are those of the header, in order."""
    tensors = {
        name: np.stack([getattr(fit, name) for fit in fits])
        for name in ("directions", "probe_weights", "probe_bias")
    }
    return VectorProfile(header, tensors)


def _evaluate_layer(
    prompts: np.ndarray, differences: np.ndarray, folds: np.ndarray, num_clusters: int, seed: int
) -> HeldOut:
    found = HeldOut(*(np.zeros(len(folds), bool) for _ in fields(HeldOut)))
    features = normalized(prompts)
    for fold in np.unique(folds):
        inside, outside = folds != fold, folds == fold
        clusters = cluster(differences[inside], num_clusters, seed)
        labels, wanted = clusters.labels, clusters.nearest(differences[outside])
        plain = fit_probe(features[inside], labels, num_clusters)
        refined, _ = refine(features[inside], labels, num_clusters, seed)
        told = refined.predict(features[outside])
        act = act_predictions(prompts[inside], labels, prompts[outside], num_clusters)
        found.majority[outside] = wanted == 0  # the largest cluster is the first
        found.act[outside] = act == wanted
        found.plain[outside] = plain.predict(features[outside]) == wanted
        found.refined[outside] = told == wanted
        along = np.einsum("ij,ij->i", differences[outside], clusters.directions[told])
        found.separated[outside] = along > 0
    return found
