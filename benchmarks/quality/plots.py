"""Pictures of a report: arms against the threshold curve, and sweeps. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MARKERS = "os^vD<>pP*X"
SWEEP_MEASURES = ("false_yes", "recall", "auc")


def save_plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what there is to draw; returns the files. Raises OSError."""
    files = []
    for suite in result["suites"]:
        if suite.get("curve"):
            files.append(folder / f"{suite['name']}-recall.png")
            _save(files[-1], (7.5, 5.5), lambda axes, suite=suite: draw_arms(axes, suite))
        for sweep, names in result["sweeps"].items():
            path = folder / f"{suite['name']}-{sweep.replace('.', '-')}.png"
            if suite["focus"] and any(each["figures"] for each in _named(suite, names)):
                _save(
                    path,
                    (7.0, 4.5),
                    lambda axes, suite=suite, names=names, sweep=sweep: draw_sweep(
                        axes, suite, sweep, names
                    ),
                )
                files.append(path)
    return files


def draw_arms(axes: Axes, suite: Mapping[str, Any]) -> None:
    """False "yes" against recall: the curve of thresholds on the unsteered margin, and the arms."""
    focus, curve = suite["focus"], suite["curve"]
    axes.step(
        [0.0, *(point["false_yes"] for point in curve)],
        [0.0, *(point["recall"] for point in curve)],
        where="post",
        color="grey",
        linewidth=1,
        label="threshold on the unsteered margin",
    )
    for arm, marker in zip(suite["arms"], cycle(MARKERS), strict=False):
        wrong = arm["figures"].get(f"{focus}/false_yes")
        right = arm["figures"].get(f"{focus}/recall")
        if not wrong or not right or wrong["value"] is None or right["value"] is None:
            continue
        axes.errorbar(
            wrong["value"],
            right["value"],
            xerr=_reach(wrong),
            yerr=_reach(right),
            marker=marker,
            fillstyle="none",
            linestyle="none",
            elinewidth=0.8,
            label=arm["name"],
        )
    axes.set(
        xlabel=f'"yes" to absent objects ({focus})',
        ylabel='"yes" to present objects (recall)',
        title=f"{suite['name']}: above the line is better than a shift of the bias",
    )
    axes.legend(fontsize="small", loc="lower right")


def draw_sweep(axes: Axes, suite: Mapping[str, Any], sweep: str, names: Sequence[str]) -> None:
    """Measures of the focus set over the values of a parameter, and of the captions if there are.

    names: of the arms, which end in "=<value>".
    """
    arms = [arm for arm in _named(suite, names) if arm["figures"]]
    labels = [arm["name"].rpartition("=")[2] for arm in arms]
    try:
        places = [float(label) for label in labels]
    except ValueError:
        places = [float(number) for number in range(len(labels))]
        axes.set_xticks(places, labels)
    keys = [f"{suite['focus']}/{measure}" for measure in SWEEP_MEASURES]
    for key in [*keys, "captions/chair_s", "captions/chair_i"]:
        figures = [arm["figures"].get(key) for arm in arms]
        if not all(figure and figure["value"] is not None for figure in figures):
            continue
        axes.errorbar(
            places,
            [figure["value"] for figure in figures],
            yerr=[[_reach(figure)[side][0] for figure in figures] for side in (0, 1)],
            marker="o",
            capsize=2,
            label=key.replace("_", " "),
        )
    axes.set(xlabel=sweep, ylim=(0, 1.02), title=suite["name"])
    axes.legend(fontsize="small")


def _save(path: Path, size: tuple[float, float], draw: Any) -> None:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    figure.savefig(path, dpi=150)


def _named(suite: Mapping[str, Any], names: Sequence[str]) -> list[Mapping[str, Any]]:
    by_name = {arm["name"]: arm for arm in suite["arms"]}
    return [by_name[name] for name in names if name in by_name]


def _reach(figure: Mapping[str, Any]) -> list[list[float]]:
    """How far the interval reaches below and above the value; none where there is no interval."""
    if figure["low"] is None:
        return [[0.0], [0.0]]
    below, above = figure["value"] - figure["low"], figure["high"] - figure["value"]
    return [[max(0.0, below)], [max(0.0, above)]]
