"""The limits of `headway bench soak`, and whether a run kept them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headway.benchmarks.soak_answers import Problem
from headway.benchmarks.soak_load import Outcome, Sample
from headway.benchmarks.soak_parity import Kept, Parity
from headway.benchmarks.soak_watch import COUNTED, HELD, Readings, Series
from headway.benchmarks.statistics import Verdict

MAX_GROWTH = 0.05
"""Most that memory may grow from the end of the warm-up to the end, as a share."""
WARM_UP_SHARE = 0.2
"""Of the soak: until then memory may grow as caches fill."""
WINDOW_SHARE = 0.1
"""Of the soak: medians over so long a time, after the warm-up and at the end, are compared."""
MIN_SECONDS = 300.0
"""A shorter soak says nothing about growth."""
MIN_SAMPLES = 5
"""So many in each window, at least."""
NOT_READ = "not judged: the server did not answer at the end"


@dataclass
class Soak:
    """All that was seen. seconds: how long scripts were sent.

    memory: (seconds since the soak began, MiB); memory_kind: what of it, None if nothing could be
    read. before, after: readings; left_out: methods that the server cannot carry out, and why.
    gone: why nothing could be read at the end, None if it could; ended_badly: how it
    ended other than by itself with exit code 0, None if it did or goes on.
    """

    seconds: float
    outcomes: Sequence[Outcome]
    before: Readings
    after: Readings
    memory: Sequence[tuple[float, float]] = ()
    memory_kind: str | None = None
    samples: Sequence[Sample] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    parity: Parity | None = None
    gone: str | None = None
    ended_badly: str | None = None

    def counted(self, name: str) -> float | None:
        """How much one of `COUNTED` grew; None where the metric is not there."""
        after = self.after[name]
        return None if after is None else after - (self.before[name] or 0.0)


@dataclass(frozen=True)
class Limit:
    """A limit and what was found. value: None where there was nothing to judge.

    unit: "share", or empty for a number of things. verdict: "holds", "fails", or "not judged: " and
    why.
    """

    name: str
    value: float | None
    limit: float
    unit: str
    verdict: str
    note: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether the run failed it."""
        return self.verdict == Verdict.FAILS

    @property
    def is_judged(self) -> bool:
        """Whether it holds or fails."""
        return self.verdict in (Verdict.HOLDS, Verdict.FAILS)


def limits(soak: Soak) -> list[Limit]:
    """Every limit, in the order of the table."""
    return [
        *_answers(soak.outcomes),
        _end(soak),
        *_metrics(soak),
        _growth(soak),
        _parity(soak.parity),
    ]


def growth(samples: Sequence[tuple[float, float]], seconds: float) -> tuple[float, float] | None:
    """MiB after the warm-up and at the end of a soak; None where there are too few samples."""
    windows = []
    for start in (WARM_UP_SHARE * seconds, (1 - WINDOW_SHARE) * seconds):
        stop = start + WINDOW_SHARE * seconds
        inside = [mib for at, mib in samples if start <= at <= stop]
        if len(inside) < MIN_SAMPLES:
            return None
        windows.append(float(np.median(inside)))
    return windows[0], windows[1]


def _answers(outcomes: Sequence[Outcome]) -> list[Limit]:
    stayed = [each for each in outcomes if not each.left]
    bad = [each for each in stayed if each.refused]
    good = [each for each in stayed if not each.refused]
    steered = [each for each in good if each.steered]
    unsteered = [each for each in good if not each.steered]
    rows: list[tuple[str, Problem, Sequence[Outcome]]] = [
        ("unexpected 5xx", Problem.SERVER_ERROR, outcomes),
        ("connection errors", Problem.CONNECTION, outcomes),
        ("bad requests not refused as they should be", Problem.WRONG_ERROR, bad),
        ("good requests refused", Problem.REFUSED, good),
        ("incomplete answers", Problem.INCOMPLETE, good),
        ("steered answers without their echo", Problem.ECHO, steered),
        ("unsteered answers that show steering", Problem.TRACE, unsteered),
    ]
    return [
        _none(name, sum(each.problem is problem for each in among), len(among))
        for name, problem, among in rows
    ]


def _none(name: str, found: float, among: int) -> Limit:
    """A limit of 0 on how many of some requests have something."""
    if not among:
        return Limit(name, None, 0, "", "not judged: there was no such request")
    return Limit(name, found, 0, "", _held(found, 0.0), f"of {among}")


def _end(soak: Soak) -> Limit:
    """The server must answer at the end of the soak, and end by itself with exit code 0."""
    found = [each for each in (soak.gone, soak.ended_badly) if each]
    name, note = "bad ends of the server", "; ".join(found)
    return Limit(name, len(found), 0, "", _held(len(found), 0.0), note)


def _metrics(soak: Soak) -> list[Limit]:
    counted = ("withheld as unsteered", "failures of steering")
    values = {name: (f"{name} ({_metric(COUNTED[name])})", soak.counted(name)) for name in counted}
    for name, series in HELD.items():
        values[name] = f"{name} at the end ({_metric(series)})", soak.after[name]
    if soak.gone:
        return [Limit(title, None, 0, "", NOT_READ) for title, _ in values.values()]
    return [_zero(title, value, name) for name, (title, value) in values.items()]


def _metric(series: Series) -> str:
    metric, labels = series
    shown = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{metric}{{{shown}}}" if shown else metric


def _zero(title: str, value: float | None, name: str) -> Limit:
    if value is None and name == "failures of steering":
        value = 0.0  # a counter with labels has no series before its first failure
    if value is None:
        return Limit(title, None, 0, "", "not judged: the server has no such metric")
    return Limit(title, value, 0, "", _held(value, 0.0))


def _growth(soak: Soak) -> Limit:
    name = f"growth of memory ({soak.memory_kind or 'PSS'} of all its processes)"
    if soak.gone:
        return Limit(name, None, MAX_GROWTH, "share", NOT_READ)
    if soak.memory_kind is None:
        return Limit(name, None, MAX_GROWTH, "share", "not judged: the processes were not seen")
    ends = growth(soak.memory, soak.seconds)
    if ends is None:
        return Limit(name, None, MAX_GROWTH, "share", "not judged: too few samples")
    share = ends[1] / ends[0] - 1
    note = f"{ends[0]:.0f} to {ends[1]:.0f} MiB"
    verdict = _held(share, MAX_GROWTH)
    if soak.seconds < MIN_SECONDS:
        verdict = f"not judged: shorter than {MIN_SECONDS:.0f} s"
    return Limit(name, share, MAX_GROWTH, "share", verdict, note)


def _parity(parity: Parity | None) -> Limit:
    name = "unsteered answers that differ from stock vLLM"
    if parity is None:
        return Limit(name, None, 0, "", "not judged: stock vLLM was not asked")
    judged = parity.count(Kept.EQUAL) + parity.count(Kept.DIFFERS)
    if not judged:
        return Limit(name, None, 0, "", "not judged: there was no such answer")
    ties = parity.count(Kept.TIE)
    note = f"of {judged}; {ties} more are ties of stock vLLM itself"
    found = parity.count(Kept.DIFFERS)
    return Limit(name, found, 0, "", _held(found, 0.0), note)


def _held(value: float, limit: float) -> str:
    return str(Verdict.HOLDS if value <= limit else Verdict.FAILS)


def by_kind(outcomes: Iterable[Outcome], seconds: float) -> list[dict[str, Any]]:
    """How each kind of traffic fared: counts, and percentiles of its times in seconds.

    Times are of answers that came to their end and are no refusals; those of a bad request are of
    the refusal.
    """
    kinds: dict[str, list[Outcome]] = {}
    for each in outcomes:
        kinds.setdefault(each.kind, []).append(each)
    rows = []
    for kind, found in kinds.items():
        whole = [each for each in found if not each.left and each.problem is None]
        kept = [each for each in whole if not each.refused] or whole
        first = [each.first for each in kept if each.first is not None]
        rows.append(
            {
                "kind": kind,
                "requests": len(found),
                "per_second": len(found) / seconds,
                "refused": sum(each.refused and each.problem is None for each in found),
                "left": sum(each.left for each in found),
                "problems": sum(each.problem is not None for each in found),
                **_percentiles("seconds", [each.seconds for each in kept]),
                **_percentiles("first", first),
            }
        )
    return rows


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"{name}_p50": None, f"{name}_p99": None}
    p50, p99 = np.percentile(values, (50, 99))
    return {f"{name}_p50": float(p50), f"{name}_p99": float(p99)}


def by_status(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """How many answers had each status and reason, and how many of them a problem."""
    counts: dict[tuple[int | None, str | None], list[int]] = {}
    for each in outcomes:
        if each.left:
            continue
        found = counts.setdefault((each.status, each.reason), [0, 0])
        found[0] += 1
        found[1] += each.problem is not None
    order = sorted(counts.items(), key=lambda item: (item[0][0] or 0, item[0][1] or ""))
    return [
        {"status": status, "reason": reason, "answers": found[0], "problems": found[1]}
        for (status, reason), found in order
    ]
