"""From answers to figures: every measure of every arm with its interval, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headway.benchmarks.quality import chair, intervals, perplexity, pope, separability
from headway.benchmarks.quality.intervals import Statistic
from headway.benchmarks.quality.methods import UNSTEERED
from headway.benchmarks.quality.run import ArmRun, Kind, Row
from headway.benchmarks.quality.separability import Margins
from headway.benchmarks.quality.suites import Suite

BASELINE = "threshold"
"""The measure: false "yes" of a plain threshold on the unsteered margins at this arm's recall."""


@dataclass(frozen=True)
class ArmStatistics:
    """An arm's measures by name, as functions of the weights of pictures or, for texts, of texts.

    A question set's measures are named "<set>/<measure>", those of captions "captions/<measure>".
    """

    pictures: Mapping[str, Statistic]
    texts: Mapping[str, Statistic]
    margins: Margins | None


def summarise(suite: Suite, runs: Sequence[ArmRun], seed: int = 0) -> dict[str, Any]:
    """The figures of a suite as JSON values; those that are not defined are None."""
    index = {name: number for number, name in enumerate(suite.pictures)}
    finished = {run.arm.name: run for run in runs if run.rows}
    statistics = {name: arm_statistics(suite, run.rows, index) for name, run in finished.items()}
    add_threshold_baseline(suite, statistics)
    weights = {"pictures": intervals.draws(len(index), seed)}
    texts = {_texts(run.rows) for run in finished.values()} - {0}
    if texts:
        weights["texts"] = intervals.draws(max(texts), seed)
    result: dict[str, Any] = {
        "name": suite.name,
        "pictures": len(suite.pictures),
        "questions": {
            name: sum(name in each.sets for each in suite.questions) for name in suite.sets
        },
        "same_questions": same_questions(suite),
        "captions": len(suite.captioned),
        "focus": suite.focus,
        "arms": [_arm(run, statistics.get(run.arm.name), weights) for run in runs],
        "contrasts": [
            _contrast(suite, finished[name], finished[other], statistics, weights)
            for name, other in contrasts(finished)
        ],
    }
    baseline = statistics.get(UNSTEERED)
    if baseline and baseline.margins:
        result["curve"] = [asdict(point) for point in separability.curve(baseline.margins)]
    cleaned: dict[str, Any] = without_nan(result)
    return cleaned


def contrasts(finished: Mapping[str, ArmRun]) -> list[tuple[str, str]]:
    """Pairs of arms to compare: each with the unsteered one, and references with their controls."""
    pairs = [(name, UNSTEERED) for name in finished if name != UNSTEERED]
    pairs = pairs if UNSTEERED in finished else []
    for name, run in finished.items():
        control = run.arm.control
        if control is not None and control.reference in finished:
            pairs.append((control.reference, name))
    return pairs


def same_questions(suite: Suite) -> list[list[str]]:
    """The names of the question sets, those together that consist of the same questions."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in suite.sets:
        numbers = tuple(i for i, each in enumerate(suite.questions) if name in each.sets)
        groups.setdefault(numbers, []).append(name)
    return list(groups.values())


def arm_statistics(suite: Suite, rows: Sequence[Row], index: Mapping[str, int]) -> ArmStatistics:
    """The statistics of one arm's answers; index: the number of each picture."""
    found: dict[str, Statistic] = {}
    for name in suite.sets:
        asked = _asked(rows, name)
        table = pope.counts(
            [bool(row.yes) for row in asked],
            [_truth(row) for row in asked],
            [index[row.request.picture or ""] for row in asked],
            len(index),
        )
        for measure in pope.MEASURES:
            found[f"{name}/{measure}"] = pope.statistic(measure, table)
        if margins := _margins(asked, index):
            found[f"{name}/auc"] = separability.auc_statistic(margins, len(index))
    captions = _of(rows, "caption")
    if captions:
        table = np.zeros((len(index), 7))
        for row in captions:
            picture = row.request.picture or ""
            objects = suite.pictures[picture].objects
            table[index[picture]] += chair.count(row.answer, row.mentions or (), objects)
        for measure in chair.MEASURES:
            found[f"captions/{measure}"] = chair.statistic(measure, table)
    texts: dict[str, Statistic] = {}
    if scored := _of(rows, "text"):
        logprobs = np.array([row.logprob for row in scored], float)
        tokens = np.array([row.tokens for row in scored], float)
        texts["perplexity"] = perplexity.statistic(logprobs, tokens)
    return ArmStatistics(found, texts, _margins(_asked(rows, suite.focus), index))


def add_threshold_baseline(suite: Suite, statistics: dict[str, ArmStatistics]) -> None:
    """Add to each arm what a threshold on the unsteered margins gives at the arm's own recall."""
    unsteered = statistics.get(UNSTEERED)
    if unsteered is None or unsteered.margins is None:
        return
    for name, arm in statistics.items():
        recall = arm.pictures[f"{suite.focus}/recall"]
        baseline = separability.false_yes_at_recall(unsteered.margins, recall)
        measures = {**arm.pictures, f"{suite.focus}/{BASELINE}": baseline}
        statistics[name] = ArmStatistics(measures, arm.texts, arm.margins)


def without_nan(value: Any) -> Any:
    """The same JSON value with None in place of what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _arm(
    run: ArmRun, statistics: ArmStatistics | None, weights: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    questions = _of(run.rows, "question")
    result: dict[str, Any] = {
        "name": run.arm.name,
        "methods": [dict(method) for method in run.arm.methods],
        "control": asdict(run.arm.control) if run.arm.control else None,
        "seconds": run.seconds,
        "error": run.error,
        "skipped": run.skipped,
        "unscored": run.unscored,
        "unclear_answers": sum(not row.as_dict()["clear"] for row in questions),
        "margins_missing": sum(row.margin is None for row in questions),
        "margins_inexact": sum(row.margin_exact is False for row in questions),
        # Positions the server edited; None where the arm asks for no steering.
        "edited": {kind: _edited(_of(run.rows, kind)) for kind in ("question", "caption", "text")},
        "heads_per_request": _heads(run.rows),
        "figures": {},
    }
    if statistics is not None:
        for group, measures in (("pictures", statistics.pictures), ("texts", statistics.texts)):
            for name, statistic in measures.items():
                figure = intervals.interval(statistic, weights[group])
                result["figures"][name] = asdict(figure)
    return result


def _contrast(
    suite: Suite,
    run: ArmRun,
    baseline: ArmRun,
    statistics: Mapping[str, ArmStatistics],
    weights: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    ours, theirs = statistics[run.arm.name], statistics[baseline.arm.name]
    differences = {}
    for group in ("pictures", "texts"):
        measures, others = getattr(ours, group), getattr(theirs, group)
        for name in measures:
            if name in others and not name.endswith(f"/{BASELINE}"):
                figure = intervals.difference(measures[name], others[name], weights[group])
                differences[name] = asdict(figure)
    focus = suite.focus
    if baseline.arm.name == UNSTEERED and f"{focus}/{BASELINE}" in ours.pictures:
        against = ours.pictures[f"{focus}/{BASELINE}"]
        figure = intervals.difference(
            ours.pictures[f"{focus}/false_yes"], against, weights["pictures"]
        )
        differences[f"{focus}/false_yes - {BASELINE}"] = asdict(figure)
    tests = {}
    for name in suite.sets:
        pairs = [
            {row.request.key: bool(row.yes) for row in _asked(each.rows, name) if not _truth(row)}
            for each in (baseline, run)
        ]
        keys = list(pairs[0])
        test = intervals.mcnemar([pairs[0][key] for key in keys], [pairs[1][key] for key in keys])
        tests[name] = asdict(test)
    return {
        "arm": run.arm.name,
        "baseline": baseline.arm.name,
        "differences": differences,
        "mcnemar_false_yes": tests,
    }


def _of(rows: Sequence[Row], kind: Kind) -> list[Row]:
    return [row for row in rows if row.request.kind == kind]


def _asked(rows: Sequence[Row], question_set: str) -> list[Row]:
    return [
        row for row in rows if row.request.question and question_set in row.request.question.sets
    ]


def _truth(row: Row) -> bool:
    return row.request.question is not None and row.request.question.truth


def _margins(rows: Sequence[Row], index: Mapping[str, int]) -> Margins | None:
    """None unless every row has a margin: a part of them would be a selection."""
    values = [row.margin for row in rows if row.margin is not None]
    if not rows or len(values) < len(rows):
        return None
    pictures = [index[row.request.picture or ""] for row in rows]
    return Margins.of(values, [_truth(row) for row in rows], pictures)


def _texts(rows: Sequence[Row]) -> int:
    return len(_of(rows, "text"))


def _edited(rows: Sequence[Row]) -> int | None:
    steered = [row.steering for row in rows if row.steering is not None]
    return sum(each.get("positions_edited", 0) for each in steered) if steered else None


def _heads(rows: Sequence[Row]) -> float | None:
    numbers = [
        len(method["heads"])
        for row in rows
        for method in (row.steering or {}).get("methods", ())
        if method.get("method") == "vhr" and isinstance(method.get("heads"), list)
    ]
    return sum(numbers) / len(numbers) if numbers else None
