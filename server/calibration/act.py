"""Shifts of attention heads, in the form of ITI (arXiv 2306.03341) and ACT (arXiv 2406.00034).

With z the output of a head, its slice of what enters the output projection, where a continuation is
read (ITI: at the last token; see `activations.Reading`), a logistic probe per head tells wanted
from unwanted continuations: sigma(theta . z + b), scikit-learn's defaults on z as it is, as in
ITI's code, both kinds weighted alike. Heads are ranked by the accuracy on prompts held out (the
mean of that on wanted and that on unwanted ones). A chosen head is shifted along its probe,

    shift = theta / |theta| * std of z . theta / |theta| over all texts,

and at serving z += strength * shift. ITI's own strength is 15 (with 48 of 1024 heads of a 7B
model). ACT's factor alpha * (1 - sigmoid(theta . z) + beta) is not part of it: the shift is the
same for every text. scikit-learn is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from headway.server.calibration.activations import PairRows
from headway.server.calibration.tables import columns
from headway.steering.vectors import VectorHeader, VectorProfile

CHANCE = 0.5


@dataclass(frozen=True)
class Texts:
    """The outputs of heads at the ends of texts.

    outputs: float32 [num_texts, num_layers, num_heads, head_size]; wanted: bool [num_texts];
    prompts: int64 [num_texts], the prompt that each belongs to.
    """

    outputs: np.ndarray
    wanted: np.ndarray
    prompts: np.ndarray


def head_texts(rows: PairRows, num_heads: int) -> Texts:
    """The texts of pairs, of rows of `head_taps`."""
    counts = [len(each) for each in rows.others]
    outputs = np.concatenate([rows.targets, *rows.others])
    prompts = np.arange(len(counts))
    return Texts(
        outputs.reshape(*outputs.shape[:2], num_heads, -1),
        np.arange(len(outputs)) < len(counts),
        np.concatenate([prompts, np.repeat(prompts, counts)]),
    )


def head_accuracy(texts: Texts, folds: np.ndarray) -> np.ndarray:
    """Held-out accuracy of every head's probe: float64 [num_layers, num_heads].

    folds: in which fold each prompt is held out, [num_prompts].
    """
    _, num_layers, num_heads, _ = texts.outputs.shape
    outside_by_fold = [folds[texts.prompts] == fold for fold in np.unique(folds)]
    accuracy = np.zeros((num_layers, num_heads))
    with threadpool_limits(1):
        for layer in tqdm(range(num_layers), desc="head probes", unit="layer"):
            for head in range(num_heads):
                z = texts.outputs[:, layer, head].astype(np.float64)
                told = np.zeros(len(z), bool)
                for outside in outside_by_fold:
                    probe = _probe(z[~outside], texts.wanted[~outside])
                    told[outside] = probe.predict(z[outside])
                right = told == texts.wanted
                kinds = right[texts.wanted].mean(), right[~texts.wanted].mean()
                accuracy[layer, head] = float(np.mean(kinds))
    return accuracy


def choose_heads(accuracy: np.ndarray, num: int) -> tuple[tuple[int, int], ...]:
    """The (layer, head) pairs of the highest accuracy above chance, at most `num`, ascending."""
    num_heads = accuracy.shape[1]
    order = np.argsort(-accuracy, axis=None, kind="stable")[:num]
    chosen = [divmod(int(index), num_heads) for index in order]
    return tuple(sorted(pair for pair in chosen if accuracy[pair] > CHANCE))


def explain_none(accuracy: np.ndarray) -> str:
    """Why `choose_heads` found none."""
    return (
        "no head's probe tells held-out continuations better than chance: at best "
        f"{accuracy.max():.2f}"
    )


def make_profile(header: VectorHeader, texts: Texts) -> VectorProfile:
    """The profile of the header's heads, their probes fitted on all texts."""
    with threadpool_limits(1):
        shifts = [
            head_shift(texts.outputs[:, layer, head], texts.wanted) for layer, head in header.heads
        ]
    return VectorProfile(header, {"shifts": np.stack(shifts).astype(np.float32)})


def head_shift(outputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """theta / |theta| * std of z . theta / |theta|: float64 [head_size].

    outputs: z, [num_texts, head_size]. Raises ValueError for a head whose outputs never differ.
    """
    exact = outputs.astype(np.float64)
    [theta] = _probe(exact, wanted).coef_
    norm = np.linalg.norm(theta)
    if not norm:
        raise ValueError("the outputs of a head are the same for all texts")
    unit = theta / norm
    return unit * (exact @ unit).std()


def table(accuracy: np.ndarray, chosen: Sequence[tuple[int, int]]) -> str:
    """The layers for people: the accuracies of their heads and which of these are chosen."""
    rows = [("layer", "median", "highest", "heads")]
    for layer, heads in enumerate(accuracy):
        named = " ".join(f"{head} ({heads[head]:.2f})" for at, head in chosen if at == layer)
        rows.append((str(layer), f"{np.median(heads):.3f}", f"{heads.max():.3f}", named))
    return columns(rows)


def _probe(outputs: np.ndarray, wanted: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(class_weight="balanced", max_iter=1000).fit(outputs, wanted)
