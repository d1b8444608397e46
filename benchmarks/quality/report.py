"""The report in Markdown: every figure with its 95 % interval, and what it may be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headway.benchmarks.quality.methods import UNSTEERED
from headway.benchmarks.quality.papers import REPORTED, SCENES_LIMITS
from headway.benchmarks.quality.pope import MEASURES as POPE_MEASURES
from headway.benchmarks.quality.summary import BASELINE

MISSING = "–"
CAPTION_COLUMNS = {
    "captions/chair_s": "CHAIR_S",
    "captions/chair_i": "CHAIR_I",
    "captions/recall": "recall",
    "captions/words": "words",
}
CONTRAST_LEGEND = (
    "McNemar: questions about absent objects to which only the first arm (+) or only the second "
    '(-) says "yes", taken as independent.'
)


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report; result: as `command.run` makes it."""
    parts = [
        "# What steering does to answers",
        f"Model {result['model']}, {result['date']}. "
        "In brackets: 95 % bootstrap intervals over pictures; p values are two-sided and not "
        "corrected for their number.",
    ]
    for suite in result["suites"]:
        parts += suite_sections(suite)
    if result["left_out"]:
        parts.append("## Left out")
        parts.append("\n".join(f"- {name}: {why}" for name, why in result["left_out"].items()))
    parts += ["## The papers' own figures", papers(), SCENES_LIMITS if result["demo"] else ""]
    parts += ["## Measured on", environment_lines(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def suite_sections(suite: Mapping[str, Any]) -> list[str]:
    """The sections of one suite, without those that were not asked for."""
    arms = [arm for arm in suite["arms"] if arm["figures"]]
    sizes = ", ".join(f"{name} {number}" for name, number in suite["questions"].items())
    heading = f"## {suite['name']}: {suite['pictures']} pictures"
    sections = [f"{heading}; questions: {sizes}" if sizes else heading]
    if sizes:
        sections += ["### Absent objects said to be there", focus_table(suite, arms)]
        sections.append(focus_legend(suite["focus"]))
        sections += ["### Every question set (POPE)", pope_table(suite, arms)]
    if suite["captions"]:
        title = f"### Captions (CHAIR), {suite['captions']} pictures"
        sections += [title, figures_table(arms, CAPTION_COLUMNS)]
    if any("perplexity" in arm["figures"] for arm in arms):
        columns = {"perplexity": "perplexity of neutral text"}
        sections += ["### Language", figures_table(arms, columns)]
    if suite["contrasts"]:
        sections += ["### Paired differences", contrast_table(suite)]
        sections.append(CONTRAST_LEGEND if sizes else "")
    if notes := suite_notes(suite):
        sections.append("\n".join(f"- {note}" for note in notes))
    return [section for section in sections if section]


def focus_table(suite: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
    """False "yes", recall, AUC and the threshold baseline on the focus set."""
    focus = suite["focus"]
    against = {
        each["arm"]: each["differences"]
        for each in suite["contrasts"]
        if each["baseline"] == UNSTEERED
    }
    header = ["arm", "false yes", "minus unsteered", "p", "recall", "AUC"]
    header += ["threshold at that recall", "minus threshold"]
    rows = []
    for arm in arms:
        differences = against.get(arm["name"], {})
        change = differences.get(f"{focus}/false_yes")
        figures = arm["figures"]
        rows.append(
            [
                arm["name"],
                show(figures.get(f"{focus}/false_yes")),
                show(change, signed=True),
                show_p(change),
                show(figures.get(f"{focus}/recall")),
                show(figures.get(f"{focus}/auc")),
                show(figures.get(f"{focus}/{BASELINE}")),
                show(differences.get(f"{focus}/false_yes - {BASELINE}"), signed=True),
            ]
        )
    return table(header, rows)


def focus_legend(focus: str) -> str:
    """What the columns of `focus_table` mean."""
    return (
        f'On the question set "{focus}". False yes: "yes" to absent objects, recall: to present '
        "ones. Threshold at that recall: the false yes of the *unsteered* model, had it said "
        '"yes" only above the margin log P(yes) - log P(no) that gives the recall of this row; a '
        "method that is not below it does no more than a shift of the bias. That threshold is "
        "found on these same answers, and one question more or less can move it far where the "
        "curve is flat, as its interval then shows. AUC: of the same margin, present against "
        "absent; no shift changes it."
    )


def pope_table(suite: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> str:
    """The measures of POPE for every question set."""
    header = ["set", "arm", *(measure.replace("_", " ") for measure in POPE_MEASURES)]
    rows = []
    for names in suite["same_questions"]:
        for arm in arms:
            figures = (arm["figures"].get(f"{names[0]}/{each}") for each in POPE_MEASURES)
            rows.append([" = ".join(names), arm["name"], *map(show, figures)])
    return table(header, rows)


def figures_table(arms: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """One row an arm; columns: figure -> heading."""
    rows = [[arm["name"], *(show(arm["figures"].get(key)) for key in columns)] for arm in arms]
    return table(["arm", *columns.values()], rows)


def contrast_table(suite: Mapping[str, Any]) -> str:
    """Differences of pairs of arms, and McNemar's test on the false "yes" of the focus set."""
    focus = suite["focus"]
    columns = {
        f"{focus}/false_yes": "false yes",
        f"{focus}/recall": "recall",
        f"{focus}/auc": "AUC",
    }
    columns |= CAPTION_COLUMNS | {"perplexity": "perplexity"}
    known = {key for each in suite["contrasts"] for key in each["differences"]}
    columns = {key: f"{name}" for key, name in columns.items() if key in known}
    if "captions/recall" in columns:
        columns["captions/recall"] = "caption recall"
    has_tests = bool(focus)
    header = ["arms", *columns.values(), *(["McNemar, false yes"] if has_tests else [])]
    rows = []
    for each in suite["contrasts"]:
        row = [f"{each['arm']} - {each['baseline']}"]
        for key in columns:
            figure = each["differences"].get(key)
            row.append(f"{show(figure, signed=True)}, p {show_p(figure)}")
        if has_tests:
            test = each["mcnemar_false_yes"][focus]
            row.append(f"+{test['gained']} -{test['lost']}, p {show_p(test)}")
        rows.append(row)
    return table(header, rows)


def suite_notes(suite: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a row."""
    notes = []
    for arm in suite["arms"]:
        name = arm["name"]
        if arm["error"]:
            notes.append(f"{name} failed: {arm['error']}")
        if arm["skipped"]:
            notes.append(f"{name} was left out: {arm['skipped']}")
        if arm["unscored"]:
            notes.append(f"{name}: no perplexity: {arm['unscored']}")
        idle = [kind for kind, number in arm["edited"].items() if number == 0]
        if idle:
            kinds = ", ".join(
                {"question": "yes/no", "text": "neutral text"}.get(k, k) for k in idle
            )
            notes.append(f"{name} edited no position in: {kinds}; nothing can differ there")
        if arm["heads_per_request"]:
            notes.append(f"{name}: {arm['heads_per_request']:.1f} heads a request")
        if arm["unclear_answers"]:
            number = arm["unclear_answers"]
            notes.append(f'{name}: {number} answers begin with neither "yes" nor "no"')
        if arm["margins_missing"]:
            notes.append(f"{name}: no margin for {arm['margins_missing']} questions, hence no AUC")
        if arm["margins_inexact"]:
            number = arm["margins_inexact"]
            notes.append(f"{name}: {number} margins are bounds, one word was not listed")
    return notes


def papers() -> str:
    """The authors' figures, for orientation."""
    rows = [
        [
            each.method,
            each.model or MISSING,
            each.measure,
            f"{each.before:.2f}",
            f"{each.after:.2f}",
            each.source,
            each.note or MISSING,
        ]
        for each in REPORTED
    ]
    return table(["method", "model", "measure", "without", "with", "source", "note"], rows)


def environment_lines(result: Mapping[str, Any]) -> str:
    """Versions, machine and commit."""
    facts = result["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    device = facts["cuda_device"] or f"{facts['cpu']}, {facts['usable_threads']} threads"
    where = f"The endpoint {result['url']}; this machine" if result["url"] else "Server and client"
    return f"{where}: {device}; {packages}; commit {facts['commit']}; seed {result['seed']}."


def show(figure: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A figure with its interval."""
    if figure is None or figure["value"] is None:
        return MISSING
    form = "+.3f" if signed else ".3f"
    if figure["low"] is None:
        return f"{figure['value']:{form}}"
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


def show_p(figure: Mapping[str, Any] | None) -> str:
    """A p value."""
    if figure is None or figure["p"] is None:
        return MISSING
    return "<0.001" if figure["p"] < 0.001 else f"{figure['p']:.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as text."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
