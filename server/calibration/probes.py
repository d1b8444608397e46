"""Probes that tell from the residual stream which direction a prompt wants.

With n(h) = h / rms(h), rms(h) = sqrt(mean h^2) over the hidden size H, a probe is

    softmax(W n(h) + b),   W [num_clusters, H], b [num_clusters],

which is what the engine computes (`headway.kernels.residual_edit`). It is fitted to

    x = (n(h) - m) / s,   m the mean of n(h) over the prompts, s^2 the mean of |n(h) - m|^2

and then written as W and b for n(h): at the end of a prompt n(h) is nearly the same for all prompts
in the first layers, and in units of s a penalty on the weights means the same at every depth and
for every model. Two steps:

 1. multinomial logistic regression (scikit-learn), C = 1, the default;
 2. refinement, the "gradient-refined" of G-ACT (arXiv 2506.18887): Adam on the cross-entropy with
    the observed clusters, in small batches, from the first probe on. The number of epochs is the
    one of the least cross-entropy on prompts held out within the training prompts (inner folds),
    epoch 0, no refinement, among them; then the refinement is run that long on all of them.

The paper's abstract and first figure were all there was to go by: the space of the probe, the
regularisation, the optimiser and the stopping rule are this project's.

scikit-learn is needed (`pip install "headway[calibrate]"`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

BATCH = 16
MAX_EPOCHS = 30
INNER_FOLDS = 5
WEIGHT_DECAY = 1e-2
MEAN_DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
"""Adam's own constants, as its paper has them."""

STEP = 0.1
"""Most that a step of the refinement changes a logit, roughly: the learning rate of the bias and,
over sqrt(hidden_size), of the weights, rows of x having length 1 on average."""

UNSEEN = 10.0
"""How far below all others the logit of a cluster begins that no training prompt is in."""


@dataclass(frozen=True)
class Probe:
    """weights: float64 [num_clusters, hidden_size]; bias: float64 [num_clusters]."""

    weights: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """W n + b: [num_rows, num_clusters]; features: n(h), [num_rows, hidden_size]."""
        return features @ self.weights.T + self.bias

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The cluster of each row, int64 [num_rows]; the first of equal logits."""
        return self.logits(features).argmax(axis=1)

    def cross_entropy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """-log softmax(W n + b)[label], on average over rows."""
        told = log_softmax(self.logits(features), axis=1)
        return float(-told[np.arange(len(labels)), labels].mean())


@dataclass(frozen=True)
class Scale:
    """x = (n - centre) / spread; centre: float64 [hidden_size]."""

    centre: np.ndarray
    spread: float

    @classmethod
    def of(cls, features: np.ndarray) -> Scale:
        """That of the rows it is fitted to, [num_rows, hidden_size]; their x has length 1."""
        centre = features.mean(axis=0)
        spread = float(np.sqrt(np.square(features - centre).sum(axis=1).mean()))
        return cls(centre, spread or 1.0)

    def apply(self, features: np.ndarray) -> np.ndarray:
        """x of rows n(h)."""
        return (features - self.centre) / self.spread

    def fold(self, probe: Probe) -> Probe:
        """The probe of n that does what `probe` does on x."""
        weights = probe.weights / self.spread
        return Probe(weights, probe.bias - weights @ self.centre)

    def unfold(self, probe: Probe) -> Probe:
        """The probe of x that does what `probe` does on n."""
        return Probe(probe.weights * self.spread, probe.bias + probe.weights @ self.centre)


def normalized(rows: np.ndarray) -> np.ndarray:
    """n(h) = h / rms(h), float64; rows of zeros stay."""
    exact = rows.astype(np.float64)
    rms = np.sqrt(np.mean(np.square(exact), axis=-1, keepdims=True))
    return exact / np.maximum(rms, np.finfo(np.float32).tiny)


def fit_probe(features: np.ndarray, labels: np.ndarray, num_clusters: int) -> Probe:
    """The logistic probe, step 1; features: n(h), [num_rows, hidden_size]; labels: [num_rows]."""
    hidden_size = features.shape[1]
    weights, bias = np.zeros((num_clusters, hidden_size)), np.zeros(num_clusters)
    seen = np.unique(labels)
    scale = Scale.of(features)
    if len(seen) > 1:
        fitted = _logistic(scale.apply(features), labels)
        if len(seen) == 2:  # scikit-learn then gives the logit of the second against the first
            weights[seen] = np.concatenate([-fitted.coef_, fitted.coef_]) / 2
            bias[seen] = np.concatenate([-fitted.intercept_, fitted.intercept_]) / 2
        else:
            weights[seen], bias[seen] = fitted.coef_, fitted.intercept_
    unseen = np.setdiff1d(np.arange(num_clusters), seen)
    bias[unseen] = bias[seen].min() - UNSEEN
    return scale.fold(Probe(weights, bias))


def refine(
    features: np.ndarray, labels: np.ndarray, num_clusters: int, seed: int
) -> tuple[Probe, int]:
    """The refined probe, steps 1 and 2, and for how many epochs it was refined."""
    start = fit_probe(features, labels, num_clusters)
    if num_clusters == 1:
        return start, 0
    epochs = _best_epochs(features, labels, num_clusters, seed)
    *_, last = refinement(start, features, labels, epochs, seed)
    return last, epochs


def refinement(
    start: Probe, features: np.ndarray, labels: np.ndarray, epochs: int, seed: int
) -> Iterator[Probe]:
    """The probe at the start and after each epoch; the same for the same seed.

    Adam (arXiv 1412.6980) on the weights and the bias for x, side by side. The gradient of the
    cross-entropy by the logits is their softmax less the one-hot cluster.
    """
    yield start
    scale = Scale.of(features)
    rows = np.column_stack([scale.apply(features), np.ones(len(features))])
    wanted = np.eye(len(start.bias))[labels]
    inner = scale.unfold(start)
    values = np.column_stack([inner.weights, inner.bias])
    hidden_size = features.shape[1]
    rate = np.append(np.full(hidden_size, STEP / np.sqrt(hidden_size)), STEP)
    decay = np.append(np.full(hidden_size, WEIGHT_DECAY), 0.0)
    mean, square, step = np.zeros_like(values), np.zeros_like(values), 0
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(rows))
        for at in range(0, len(order), BATCH):
            batch = order[at : at + BATCH]
            error = softmax(rows[batch] @ values.T, axis=1) - wanted[batch]
            gradient = error.T @ rows[batch] / len(batch) + decay * values
            step += 1
            mean += (1 - MEAN_DECAY) * (gradient - mean)
            square += (1 - SQUARE_DECAY) * (gradient**2 - square)
            slope = np.sqrt(square / (1 - SQUARE_DECAY**step)) + EPSILON
            values = values - rate * mean / (1 - MEAN_DECAY**step) / slope
        yield scale.fold(Probe(values[:, :-1], values[:, -1]))


def act_predictions(
    rows: np.ndarray, labels: np.ndarray, held_out: np.ndarray, num_clusters: int
) -> np.ndarray:
    """The clusters of held-out rows by the probes of ACT, as we read it: int64 [num_held_out].

    ACT (arXiv 2406.00034) has an independent sigmoid probe sigma(theta . x) per cluster, on the
    activations as they are, all clusters at once. Our reading where one cluster is to be told: a
    binary logistic regression per cluster, it against the rest, on the raw h with scikit-learn's
    defaults, as published code of head interventions fits its probes; the highest sigmoid counts.

    rows, held_out: h, not normalised, [num_rows, hidden_size].
    """
    sigmoids = np.zeros((len(held_out), num_clusters))
    for cluster in range(num_clusters):
        is_cluster = labels == cluster
        if is_cluster.all() or not is_cluster.any():
            sigmoids[:, cluster] = float(is_cluster.all())
            continue
        fitted = _logistic(rows, is_cluster)
        sigmoids[:, cluster] = fitted.predict_proba(held_out)[:, 1]
    return sigmoids.argmax(axis=1)


def _best_epochs(features: np.ndarray, labels: np.ndarray, num_clusters: int, seed: int) -> int:
    """Epochs of refinement with the least mean cross-entropy over the inner folds."""
    generator = np.random.default_rng(seed)
    folds = generator.permutation(len(labels)) % min(INNER_FOLDS, len(labels))
    losses = np.zeros(MAX_EPOCHS + 1)
    for fold in range(folds.max() + 1):
        inside, outside = folds != fold, folds == fold
        start = fit_probe(features[inside], labels[inside], num_clusters)
        path = refinement(start, features[inside], labels[inside], MAX_EPOCHS, seed)
        losses += [
            probe.cross_entropy(features[outside], labels[outside]) * outside.sum()
            for probe in path
        ]
    return int(losses.argmin())


def _logistic(rows: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        # Stopping short of the optimum is one more regularisation, not a failure.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(max_iter=1000).fit(rows, labels)
