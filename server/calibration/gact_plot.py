"""The pictures of a G-ACT calibration. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from headway.server.calibration.gact import HeldOut
from headway.server.calibration.held_out import wilson

CURVES = {
    "act": ("ACT (our reading)", "tab:orange", "--"),
    "plain": ("before refinement", "tab:blue", ":"),
    "refined": ("refined", "tab:blue", "-"),
}


def save_plot(
    found: HeldOut,
    chosen: Sequence[int],
    layer: int,
    differences: np.ndarray,
    labels: np.ndarray,
    title: str,
    path: Path,
) -> None:
    """Draw accuracy by layer and the differences of one layer, in the format of the suffix.

    differences: d at `layer`, [num_prompts, hidden_size]; labels: their clusters, [num_prompts].
    Raises OSError, or ValueError for an unknown format.
    """
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    by_layer, components = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_accuracy(by_layer, found, chosen)
    _draw_differences(components, differences, labels, layer)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def principal_components(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of d, [num_prompts, 2], and their shares of variance."""
    centred = differences.astype(np.float64) - differences.mean(axis=0, dtype=np.float64)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    total = max(float(np.square(values).sum()), np.finfo(np.float64).tiny)
    return centred @ directions[:2].T, np.square(values[:2]) / total


def _draw_accuracy(axes: Axes, found: HeldOut, chosen: Sequence[int]) -> None:
    layers = np.arange(len(found.refined))
    floor = found.majority.mean(axis=1)
    axes.fill_between(layers, 0, floor, color="grey", alpha=0.2, label="majority", step="mid")
    intervals = [wilson(hits) for hits in found.refined]
    low, high = ([getattr(each, end) for each in intervals] for end in ("low", "high"))
    axes.fill_between(layers, low, high, color="tab:blue", alpha=0.12, label="refined, 95 %")
    for name, (label, colour, style) in CURVES.items():
        axes.plot(
            layers, getattr(found, name).mean(axis=1), color=colour, linestyle=style, label=label
        )
    axes.scatter(
        list(chosen),
        found.refined[list(chosen)].mean(axis=1),
        color="tab:blue",
        edgecolors="black",
        zorder=3,
        label="chosen",
    )
    axes.set(xlabel="layer", ylabel="accuracy on held-out prompts", ylim=(0, 1.02))
    axes.set_title("Telling the cluster of a prompt")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small", loc="lower right")


def _draw_differences(axes: Axes, differences: np.ndarray, labels: np.ndarray, layer: int) -> None:
    points, shares = principal_components(differences)
    for cluster in range(int(labels.max()) + 1):
        x, y = points[labels == cluster].T
        axes.scatter(x, y, s=18, label=f"cluster {cluster} ({len(x)})")
    axes.set(
        xlabel=f"first component ({shares[0]:.0%} of the variance)",
        ylabel=f"second ({shares[1]:.0%})",
        title=f"Differences d at layer {layer}",
    )
    axes.legend(fontsize="small")
