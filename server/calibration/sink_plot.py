"""The picture of a sink calibration. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from headway.server.calibration.sinks import middle_layers
from headway.steering.sinks import SinkProfile


def save_plot(profile: SinkProfile, levels: torch.Tensor, path: Path) -> None:
    """Draw phi by layer and the sorted levels of the first token, in the format of the suffix.

    levels: as of `first_token_levels`, [num_prompts, hidden_size]. Raises OSError, or ValueError
    for an unknown format.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_layer, by_rank = figure.subplots(1, 2)
    _draw_layers(by_layer, profile)
    _draw_levels(by_rank, levels.mean(dim=0), profile.dims)
    figure.suptitle(f"Sink dimensions of {profile.architecture}")
    figure.savefig(path, dpi=150)


def _draw_layers(axes: Axes, profile: SinkProfile) -> None:
    layers = range(profile.num_layers)
    for measured in profile.measurements:
        (line,) = axes.plot(layers, measured.phi_first, label=f"dim {measured.dim}, first token")
        axes.plot(
            layers,
            measured.phi_other,
            linestyle="--",
            color=line.get_color(),
            label=f"dim {measured.dim}, others (median)",
        )
    axes.axhline(profile.tau, color="grey", linewidth=1, linestyle=":", label="tau")
    middle = middle_layers(profile.num_layers)
    axes.axvspan(middle.start, middle.stop - 1, color="grey", alpha=0.1, label="middle layers")
    axes.set(xlabel="layer", ylabel="phi = |x[d]| / RMS(x)", title="entering each layer")
    axes.legend(fontsize="small")


def _draw_levels(axes: Axes, levels: torch.Tensor, dims: Sequence[int]) -> None:
    values, order = levels.sort(descending=True)
    ranks = range(1, len(values) + 1)
    axes.loglog(ranks, values.clamp_min(1e-4).tolist(), marker=".", linewidth=1)
    for rank, dim in zip(ranks, order.tolist(), strict=True):
        if dim in dims:
            at = (rank, float(levels[dim]))
            axes.annotate(str(dim), at, textcoords="offset points", xytext=(6, 0))
    axes.axhline(float(values.quantile(0.5)), color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="rank of the dimension", ylabel="|x[d]| / RMS(x)", title="first token")
