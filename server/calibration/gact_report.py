"""What a G-ACT calibration found, as JSON and as a table."""

from __future__ import annotations

import math
from typing import Any

from headway.server.calibration.gact import HeldOut
from headway.server.calibration.held_out import Interval, bootstrap_mean, wilson
from headway.server.calibration.tables import columns

PROBES = ("majority", "act", "plain", "refined")
"""What is compared, by its name in a report."""

MEANING = {
    "majority": "the largest cluster of the training prompts for every prompt: a floor",
    "act": "one sigmoid probe per cluster on the raw stream: our reading of ACT, arXiv 2406.00034",
    "plain": "multinomial logistic probe on h / rms(h), before refinement",
    "refined": "the same after gradient refinement; what the profile holds",
    "separated": "share of prompts whose difference has a positive component along the direction "
    "that the refined probe picks",
    "intervals": "95 %: Wilson's by layer; percentile bootstrap over prompts for means and "
    "differences, given the folds",
}

PUBLISHED = {
    "source": "arXiv 2506.18887, abstract: the paper's own figures, not measured here",
    "model": "LLaMA-3.2-3B",
    "mean probe accuracy, all layers": "+15 % over ACT",
    "probe accuracy, layers 0-6": "+61.5 % over ACT",
}
"""The claims of the paper, to stand beside what was measured."""


def first_fifth(num_layers: int) -> range:
    """The first fifth of the layers, rounded up."""
    return range(math.ceil(num_layers / 5))


def probe_means(found: HeldOut, seed: int) -> dict[str, dict[str, Interval]]:
    """Mean held-out accuracy over all layers and over the first fifth, and paired differences.

    group of layers -> name of a probe, "refined - plain" or "refined - act" -> value with interval
    over prompts.
    """
    num_layers = len(found.refined)
    groups = {"all layers": range(num_layers), "first fifth": first_fifth(num_layers)}
    means = {}
    for group, layers in groups.items():
        by_prompt = {
            name: getattr(found, name)[list(layers)].astype(float).mean(axis=0) for name in PROBES
        }
        for before in ("plain", "act"):
            by_prompt[f"refined - {before}"] = by_prompt["refined"] - by_prompt[before]
        means[group] = {name: bootstrap_mean(each, seed) for name, each in by_prompt.items()}
    return means


def report(found: HeldOut, cluster_sizes: list[list[int]], seed: int) -> dict[str, Any]:
    """The figures, as plain values; cluster_sizes: by layer, of all prompts."""
    layers = [
        {
            "layer": layer,
            "cluster_sizes": cluster_sizes[layer],
            **{
                name: wilson(getattr(found, name)[layer]).rounded()
                for name in (*PROBES, "separated")
            },
        }
        for layer in range(len(found.refined))
    ]
    means = {
        group: {name: interval.rounded() for name, interval in each.items()}
        for group, each in probe_means(found, seed).items()
    }
    return {"layers": layers, "means": means, "meaning": MEANING, "published": PUBLISHED}


def table(found: HeldOut, cluster_sizes: list[list[int]], chosen: tuple[int, ...]) -> str:
    """Held-out accuracies for people, a row per layer, the chosen layers marked."""
    rows: list[tuple[str, ...]] = [
        ("layer", "majority", "ACT", "plain", "refined", "95 %", "separated", "cluster sizes")
    ]
    for layer, sizes in enumerate(cluster_sizes):
        interval = wilson(found.refined[layer])
        shares = (f"{getattr(found, name)[layer].mean():.3f}" for name in PROBES)
        rows.append(
            (
                f"{'*' if layer in chosen else ''}{layer}",
                *shares,
                f"{interval.low:.2f} .. {interval.high:.2f}",
                f"{found.separated[layer].mean():.3f}",
                " ".join(map(str, sizes)),
            )
        )
    return columns(rows)


def summary(found: HeldOut, seed: int) -> str:
    """The means and the paired differences for people, beside what the paper claims."""
    lines = []
    for group, means in probe_means(found, seed).items():
        shares = ", ".join(f"{name} {means[name].value:.3f}" for name in PROBES)
        lines.append(f"{group}: {shares}")
        for name in ("refined - plain", "refined - act"):
            each = means[name]
            lines.append(f"  {name}: {each.value:+.3f} [{each.low:+.3f}, {each.high:+.3f}]")
    claims = "; ".join(f"{what}: {claim}" for what, claim in list(PUBLISHED.items())[2:])
    lines.append(f"published for {PUBLISHED['model']} (arXiv 2506.18887): {claims}")
    return "\n".join(lines)
