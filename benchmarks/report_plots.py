"""The plots of `headway bench report`, as SVG elements that are readable on light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from headway.benchmarks.report_blocks import Word
from headway.benchmarks.report_parts import Finding

INK = "#010203"
"""Stands for the colour of the text around a plot."""
COLOURS = ("#2a8fd0", "#d5651b", "#17a27a", "#c9699f", "#c99a12", "#8a7fd1", "#888888")
MARKERS = "osD^vPX"
LOOKS = {"holds": ("#17a27a", "o"), "fails": ("#e0483a", "X"), "undecided": ("#c99a12", "D")}
"""Colour and marker of a verdict."""
PLAIN = ("#2a8fd0", "s")
MOST_SHOWN = 1.25
"""How far, as a factor of the outermost ratio or bar, an interval is drawn before it is cut."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": "#888888",
    "grid.alpha": 0.35,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Point:
    """A ratio at a place of the horizontal axis."""

    x: float
    found: Finding


def forest(name: str, rows: Sequence[Finding], label: str, log: bool = False) -> str:
    """A row for each finding: its value, interval and bar, marked by its verdict. SVG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 1.1 + 0.27 * len(rows)))
        axes = figure.add_subplot()
        low, high = _shown(rows)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
        seen = set()
        for y, found in enumerate(rows):
            kind = Word(found.verdict).kind if found.verdict else "no bar"
            colour, marker = LOOKS.get(kind, PLAIN)
            text = None if kind in seen else kind
            seen.add(kind)
            axes.hlines(y, max(found.low, low), min(found.high, high), color=colour, linewidth=1.6)
            axes.plot(found.value, y, marker, color=colour, markersize=6, label=text)
            for end, arrow, is_cut in (
                (low, "<", found.low < low),
                (high, ">", found.high > high),
            ):
                if is_cut:
                    axes.plot(end, y, arrow, color=colour, markersize=5, clip_on=False)
            if found.bar is not None:
                axes.plot(found.bar, y, "|", color=INK, markersize=13, markeredgewidth=1.6)
        if any(found.bar is not None for found in rows):
            axes.plot([], [], "|", color=INK, markersize=10, markeredgewidth=1.6, label="bar")
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        margin = (high - low) * 0.03
        axes.set_xlim((low * 0.97, high * 1.03) if log else (low - margin, high + margin))
        axes.set_yticks(range(len(rows)), [found.name for found in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(axis="x")
        _legend(figure)
        return _svg(figure, name)


def growth(
    name: str, panels: Mapping[str, Mapping[str, Sequence[Point]]], xlabel: str, ylabel: str
) -> str:
    """A panel for each title, in it a line for each label through its points. SVG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4))
        every = [p.found for lines in panels.values() for points in lines.values() for p in points]
        low, high = _shown(every)
        margin = (high - low) * 0.04
        labels = dict.fromkeys(label for lines in panels.values() for label in lines)
        looks = dict(zip(labels, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
        for index, (title, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for place, (label, points) in enumerate(lines.items()):
                colour, marker = looks[label]
                _line(axes, points, place - (len(lines) - 1) / 2, label, colour, marker)
            axes.set_xscale("log", base=2)
            ticks = sorted({p.x for points in lines.values() for p in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
            axes.set_ylim(low - margin, high + margin)
            axes.axhline(1.0, color="#888888", linewidth=0.8)
            axes.set_title(title)
            axes.set_xlabel(xlabel)
            axes.grid(axis="y")
            if index == 0:
                axes.set_ylabel(ylabel)
        figure.tight_layout()
        _legend(figure)
        return _svg(figure, name)


def modelled(name: str, rows: Mapping[str, Sequence[tuple[str, float, float]]]) -> str:
    """Of each GPU, the roofline and the modelled time of each case, both in seconds. SVG."""
    with rc_context(STYLE):
        count = max(map(len, rows.values()))
        figure = Figure(figsize=(8, 1.2 + 0.22 * count))
        for index, (gpu, cases) in enumerate(rows.items()):
            axes = figure.add_subplot(1, len(rows), index + 1)
            for y, (_, roofline, seconds) in enumerate(cases):
                axes.hlines(y, roofline * 1e6, seconds * 1e6, color="#888888", linewidth=1)
                first = y == 0
                for value, marker, colour, label in (
                    (roofline, "|", INK, "roofline, modelled"),
                    (seconds, "o", COLOURS[1], "modelled"),
                ):
                    text = label if first else None
                    axes.plot(value * 1e6, y, marker, color=colour, markersize=6, label=text)
            axes.set_xscale("log")
            axes.set_yticks(range(len(cases)), [case for case, _, _ in cases] if not index else [])
            axes.set_ylim(len(cases) - 0.4, -0.6)
            axes.set_title(f"{gpu}, modelled")
            axes.set_xlabel("modelled microseconds a call")
            axes.grid(axis="x")
        _legend(figure)
        return _svg(figure, name)


def as_file(svg: str) -> str:
    """A plot as an SVG file, which has to bring its background."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = 'style="color:#222;background-color:#fff"'
    return svg.replace("<svg ", f"<svg {names} {style} ", 1)


def _line(
    axes: Axes, points: Sequence[Point], place: float, label: str, colour: str, marker: str
) -> None:
    ordered = sorted(points, key=lambda point: point.x)
    x = [point.x * 1.03**place for point in ordered]  # side by side, so that all can be seen
    y = [point.found.value for point in ordered]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label)
    low, high = ([getattr(point.found, end) for point in ordered] for end in ("low", "high"))
    axes.vlines(x, low, high, color=colour, linewidth=1.4)


def _shown(rows: Sequence[Finding]) -> tuple[float, float]:
    """Both ends of the axis: all values and bars, and of the intervals what is not far out."""
    places = [1.0, *(found.value for found in rows)]
    places += [found.bar for found in rows if found.bar is not None]
    low = max(min(found.low for found in rows), min(places) / MOST_SHOWN)
    high = min(max(found.high for found in rows), max(places) * MOST_SHOWN)
    return min(low, *places), max(high, *places)


def _legend(figure: Figure) -> None:
    """One for all panels, above them."""
    looks: dict[str, Any] = {}
    for axes in figure.axes:
        looks |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if not looks:
        return
    top = figure.axes[0].get_position().y1
    inches = 0.22 if figure.axes[0].get_title() else 0.0
    figure.legend(
        list(looks.values()),
        list(looks),
        loc="lower center",
        bbox_to_anchor=(0.5, top + inches / figure.get_figheight()),
        ncols=5,
        handlelength=1.2,
    )


def _svg(figure: Figure, name: str) -> str:
    """The element alone. Its ids are told from those of other plots on a page by its name."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata=nothing
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    return svg.replace(INK, "currentColor")
