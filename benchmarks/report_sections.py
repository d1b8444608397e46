"""The sections of `headway bench report`, each from the parts that it can be made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headway.benchmarks import report_kernels as kernels
from headway.benchmarks import report_plots as plots
from headway.benchmarks import report_tables as tables
from headway.benchmarks import soak_report as soak
from headway.benchmarks.report_blocks import Block, Plot, Section, Text
from headway.benchmarks.report_parts import (
    COMMANDS,
    MALFORMED,
    MODELLED,
    TOKENS_PER_SECOND,
    Finding,
    Part,
    findings,
)

Parts = Mapping[str, Part]
FOREST_NOTE = "Where there is an arrow, the interval goes on beyond the plot."
RATIO_LABEL = "tokens/s relative to the baseline (more is better)"
Lines = dict[str, dict[int, Finding]]
"""Label -> place on an axis -> finding."""


Builder = Callable[[Part], list[Block]]


def sections(parts: Parts, passed_over: Sequence[str]) -> list[Section]:
    """Everything a report says. Raises PartError for a part of another shape."""
    return [
        _what_was_measured(parts, passed_over),
        Section("2. Bars", [tables.bars(list(parts.values()))]),
        _section(
            "3. Overhead by method and batch",
            parts,
            {"serve": ("Over HTTP", _by_batch), "overhead": ("Engine alone", _overhead)},
        ),
        _section(
            "4. Growth with context and with configurations",
            parts,
            {
                "serve": ("Over HTTP", _serve_growth),
                "overhead": ("Engine alone", _overhead_growth),
            },
        ),
        _section("5. Latency and memory", parts, {"serve": ("Over HTTP", _latency)}),
        _section("6. Other systems", parts, {"peers": ("One method at a time", _peers)}),
        _section(
            "7. Single methods",
            parts,
            {
                "sgrs": ("SGRS", _sgrs),
                "head-selection": ("Head selection by the prompt", _head_selection),
                "vectors": ("Vector profiles: answers", lambda part: [tables.vectors(part)]),
                "profile-loading": ("Vector profiles: loading", _profile_loading),
            },
        ),
        _section(
            "8a. Kernels: measured", parts, {"kernels": ("On a CUDA device", kernels.measured)}
        ),
        _section(
            "8b. Kernels: modelled, not measured",
            parts,
            {MODELLED: ("Modelled from data sheets", kernels.modelled)},
        ),
        _section(
            "8c. Kernels: compiled, not run",
            parts,
            {MODELLED: ("Properties of the code", kernels.compiled)},
        ),
        _section("9. Soak", parts, {"soak": ("Limits under mixed traffic", soak.blocks)}),
    ]


def _section(title: str, parts: Parts, rows: Mapping[str, tuple[str, Builder]]) -> Section:
    """The blocks of every part that is there, or which command makes it."""
    section = Section(title)
    runs = sum(key in parts for key in rows)
    if runs > 1:
        note = "Ratios were taken within a run; times of different runs are not to be compared."
        section.blocks.append(Text(f"From {runs} runs at different times. {note}"))
    for key, (heading, builder) in rows.items():
        section.blocks.append(Text(heading, "heading"))
        part = parts.get(key)
        if part is None:
            section.blocks.append(Text(f"No data: `{COMMANDS[key]}` makes it.", "missing"))
            continue
        section.blocks.append(Text(_run(part)))
        try:
            section.blocks += builder(part)
        except MALFORMED as error:
            raise part.error(error) from None
    return section


def _run(part: Part) -> str:
    """Which run the figures below are of."""
    facts = tables.facts(part)
    names = ("model", "dtype", "rounds", "cuda_device", "cpu", "commit")
    found = [f"{name} {facts[name]}" for name in names if facts.get(name, "none") != "none"]
    warned = f" Warnings, see section 1: {len(part.warnings)}." if part.warnings else ""
    return f"Run: {part.source}; {', '.join(found)}.{warned}"


def _what_was_measured(parts: Parts, passed_over: Sequence[str]) -> Section:
    warned: dict[str, list[str]] = {}
    for key, part in parts.items():
        for warning in part.warnings:
            warned.setdefault(warning, []).append(f"{key} ({part.source})")
    blocks: list[Block] = [
        Text(f"{'; '.join(runs)}: {warning}", "warning") for warning, runs in warned.items()
    ]
    found = list(parts.values())
    if len({part.environment.get("commit") for part in found}) > 1:
        blocks.append(Text("The runs are of different commits.", "warning"))
    if not blocks:
        blocks.append(Text("No run has warnings."))
    blocks += tables.environment_tables(found)
    blocks += [Text(f"Passed over: {each}") for each in passed_over]
    return Section("1. What was measured", blocks)


def _overhead(part: Part) -> list[Block]:
    rows = findings(part)
    blocks: list[Block] = []
    if rows:
        svg = plots.forest("overhead-ratios", rows, RATIO_LABEL)
        title = "Engine alone: tokens/s, steered or idle, relative to the baseline"
        blocks.append(Plot(title, "overhead-ratios", svg, part.source, FOREST_NOTE))
    table = tables.comparisons(part, "Engine alone: all comparisons")
    return [*blocks, table]


def _by_batch(part: Part) -> list[Block]:
    """Ratios at the context that most comparisons are at, ordered by method and batch."""
    rows = [row for row in _serve_rows(part) if row[0]["share"] in ("all", "none")]
    usual = {}
    for modality in {facts["modality"] for facts, _ in rows}:
        contexts = Counter(f["context"] for f, _ in rows if f["modality"] == modality)
        usual[modality] = contexts.most_common(1)[0][0]
    shown = [
        (facts, found)
        for facts, found in rows
        if facts["context"] == usual[facts["modality"]]
        and facts["configurations"] == _configurations(rows, facts)
    ]
    shown.sort(key=lambda row: (row[0]["modality"] != "text", _method(row[0]), row[0]["batch"]))
    blocks: list[Block] = []
    if shown:
        svg = plots.forest("serve-by-batch", [found for _, found in shown], RATIO_LABEL)
        at = ", ".join(f"{name} at context {context}" for name, context in sorted(usual.items()))
        note = f"All requests steered, each in a way of its own ({at}). {FOREST_NOTE}"
        title = "Over HTTP: tokens/s by method and batch"
        blocks.append(Plot(title, "serve-by-batch", svg, part.source, note))
    title = "Over HTTP: all comparisons of tokens/s"
    return [*blocks, tables.comparisons(part, title, [TOKENS_PER_SECOND])]


def _method(facts: Mapping[str, Any]) -> str:
    """What the loads of a comparison are called: idle where they are not steered."""
    return "idle" if facts["share"] == "none" else str(facts["arm"])


def _serve_rows(part: Part) -> list[tuple[dict[str, Any], Finding]]:
    """What is known of each comparison of tokens/s, and the finding."""
    pairs = zip(part.result["comparisons"], findings(part), strict=True)
    return [(facts, found) for facts, found in pairs if found.metric == TOKENS_PER_SECOND]


def _configurations(rows: Sequence[tuple[dict[str, Any], Finding]], facts: dict[str, Any]) -> int:
    """The most configurations that the same load was compared with."""
    same = ("arm", "batch", "context", "modality", "share")
    alike = (other for other, _ in rows if all(other[key] == facts[key] for key in same))
    return max(int(other["configurations"]) for other in alike)


def _serve_growth(part: Part) -> list[Block]:
    rows = [row for row in _serve_rows(part) if row[0]["share"] in ("all", "none")]
    contexts: dict[str, Lines] = {}
    configured: dict[str, Lines] = {}
    for facts, found in rows:
        label = f"{_method(facts)} / {facts['baseline']}"
        if facts["modality"] == "text" and facts["configurations"] == _configurations(rows, facts):
            panel = contexts.setdefault(f"{facts['batch']} at once", {})
            panel.setdefault(label, {})[facts["context"]] = found
        if facts["share"] == "all":
            load = f"{facts['batch']} at once, {facts['modality']}, context {facts['context']}"
            panel = configured.setdefault(load, {})
            panel.setdefault(label, {})[facts["configurations"]] = found
    command = COMMANDS["serve"]
    return [
        *_grown(part, "serve-context", "context", "context, tokens", contexts, 2, command),
        *_grown(
            part, "serve-configurations", "configurations", "configurations", configured, 2, command
        ),
    ]


def _overhead_growth(part: Part) -> list[Block]:
    scenarios = {row["name"]: row for row in part.result["scenarios"]}
    contexts: Lines = {}
    configured: Lines = {}
    for row, found in zip(part.result["comparisons"], findings(part), strict=True):
        steered, baseline = scenarios[row["scenario"]], scenarios[row["baseline"]]
        if steered["steering"] is None:
            continue
        if baseline["steering"] is None and steered["cached"]:
            # A prompt is one token longer than the context: its last is computed.
            label = f"{steered['steering']} / idle, {steered['num_requests']} at once"
            contexts.setdefault(label, {})[steered["prompt_tokens"] - 1] = found
        if baseline["steering"] == steered["steering"]:
            label = f"{steered['steering']} / itself with {baseline['configurations']}"
            configured.setdefault(label, {})[steered["configurations"]] = found
    note = "At the longest context all requests share one prompt and one configuration."
    panels, command = {"engine alone": contexts}, COMMANDS["overhead"]
    args = ("overhead-context", "context", "context, tokens")
    blocks = _grown(part, *args, panels, 2, command, note)
    panels = {"engine alone": configured}
    args = ("overhead-configurations", "configurations", "configurations")
    return blocks + _grown(part, *args, panels, 1, command)


def _grown(
    part: Part,
    name: str,
    axis: str,
    xlabel: str,
    panels: Mapping[str, Lines],
    fewest: int,
    command: str,
    note: str = "",
) -> list[Block]:
    """A plot and a table of what has figures at `fewest` places of an axis or more."""
    kept = {
        title: {label: found for label, found in lines.items() if len(found) >= fewest}
        for title, lines in panels.items()
    }
    kept = {title: lines for title, lines in kept.items() if lines}
    what = f"Growth with {axis}"
    if not kept:
        text = f"{what}: this run has no two to compare. `{command}` without --quick makes them."
        return [Text(text, "missing")]
    points = {
        title: {
            label: [plots.Point(place, found) for place, found in places.items()]
            for label, places in lines.items()
        }
        for title, lines in kept.items()
    }
    svg = plots.growth(name, points, xlabel, "tokens/s, ratio")
    rows = {
        f"{label}, {title}": found
        for title, lines in kept.items()
        for label, found in lines.items()
    }
    return [
        Plot(what, name, svg, part.source, note),
        tables.matrix(f"{what}: tokens/s, ratios", rows, axis, part.source, note),
    ]


def _latency(part: Part) -> list[Block]:
    return [tables.latency(part), tables.time_ratios(part), tables.memory(part)]


def _peers(part: Part) -> list[Block]:
    rows = findings(part)
    blocks: list[Block] = []
    if rows:
        label = "Headway's tokens/s relative to the other system's"
        svg = plots.forest("peers", rows, label, log=True)
        title = "Headway relative to other systems"
        blocks.append(Plot(title, "peers", svg, part.source, FOREST_NOTE))
    return [*blocks, *tables.peers(part)]


def _sgrs(part: Part) -> list[Block]:
    return [tables.sgrs(part), tables.comparisons(part, "SGRS: ratios of these times")]


def _head_selection(part: Part) -> list[Block]:
    title = "Head selection: relative to unsteered requests"
    return [tables.head_selection(part), tables.comparisons(part, title)]


def _profile_loading(part: Part) -> list[Block]:
    note = "Medians over rounds; seconds, and steps of the stream that runs beside."
    for row in part.result["comparisons"]:
        if row["unit"] == "steps":
            note += f" The largest stall, {row['largest']:.3f} steps, is held against the bar."
    return [tables.comparisons(part, "Loading a new profile", note=note)]
