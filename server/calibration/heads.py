"""Finding the heads of a model that react to images most (VHR, arXiv 2412.13949).

VHR chooses, for every prompt, the heads of a layer whose VHD is above the layer's median. Here the
same is done once, on the mean VHD over many pictures: the heads no longer depend on the prompt, and
a request that names them needs no second pass without the image. Unlike VHR's own, which sees the
layers below already reinforced, this choice is made on the unedited model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headway.kernels.head_selection import above_median
from headway.steering import ModelGeometry
from headway.steering.heads import HeadProfile

SHOWN = 10
"""How many heads of the highest VHD the table names."""


def select_heads(vhd: torch.Tensor, layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The (layer, head) pairs above the median of their layer; vhd: [num_layers, num_heads]."""
    return tuple(
        (layer, head)
        for layer in sorted(layers)
        for head in above_median(vhd[layer]).nonzero().flatten().tolist()
    )


def explain_none(vhd: torch.Tensor, layers: Sequence[int]) -> str:
    """Why `select_heads` found none: no head of a layer stands above the others."""
    return (
        f"no head chosen in the layers {', '.join(map(str, sorted(layers)))}: in each at least "
        f"half of the heads have its highest VHD, {float(vhd[list(layers)].max()):.3g} at most"
    )


def make_profile(
    vhd: torch.Tensor,
    layers: Sequence[int],
    alpha: float,
    num_images: int,
    questions: Sequence[str],
    geometry: ModelGeometry,
) -> HeadProfile:
    """The profile of a model with this mean VHD, [num_layers, num_heads], some head chosen."""
    return HeadProfile.of(
        geometry,
        num_heads=geometry.num_heads,
        heads=select_heads(vhd, layers),
        layers=tuple(sorted(layers)),
        alpha=alpha,
        num_images=num_images,
        questions=tuple(questions),
        vhd=tuple(tuple(round(value, 6) for value in row) for row in vhd.tolist()),
    )


def table(profile: HeadProfile) -> str:
    """The profile for people: a row per layer, and the heads of the highest VHD among all."""
    vhd = torch.tensor(profile.vhd)
    rows = [("layer", "median VHD", "highest", "heads")]
    for layer in profile.layers:
        heads = [head for at, head in profile.heads if at == layer]
        median, highest = float(vhd[layer].median()), float(vhd[layer].max())
        rows.append((str(layer), f"{median:.3f}", f"{highest:.3f}", " ".join(map(str, heads))))
    *numbers, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([*map(str.rjust, row[:-1], numbers), row[-1]]).rstrip() for row in rows]
    strongest = sorted(profile.heads, key=lambda pair: -float(vhd[pair]))[:SHOWN]
    named = ", ".join(f"{list(pair)} {float(vhd[pair]):.3f}" for pair in strongest)
    title = (
        f"{profile.architecture}, {profile.num_layers} layers, {profile.num_heads} heads: mean VHD "
        f"over {profile.num_images} images, {len(profile.heads)} heads of "
        f"{len(profile.layers)} layers chosen"
    )
    return "\n".join([title, *lines, f"highest of the chosen, [layer, head]: {named}"])
