"""The picture of a heads calibration. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from headway.steering.heads import HeadProfile


def save_plot(profile: HeadProfile, path: Path) -> None:
    """Draw VHD over layers and heads, the chosen heads marked, in the format of the suffix.

    Raises OSError, or ValueError for an unknown format.
    """
    vhd = torch.tensor(profile.vhd)
    size = (2.5 + 0.25 * profile.num_heads, 1.5 + 0.22 * profile.num_layers)
    figure = Figure(figsize=(max(size[0], 4.5), max(size[1], 3.0)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    picture = axes.imshow(vhd.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    layers, heads = zip(*profile.heads, strict=True)
    axes.scatter(
        heads, layers, s=18, facecolors="white", edgecolors="black", linewidths=0.6, label="chosen"
    )
    axes.set(xlabel="query head", ylabel="layer", title=f"VHD of {profile.architecture}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.08), fontsize="small", frameon=False)
    figure.colorbar(picture, ax=axes, label=f"mean VHD over {profile.num_images} images")
    figure.savefig(path, dpi=150)
