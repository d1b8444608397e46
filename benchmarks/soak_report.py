"""The report of `headway bench soak`: limits, traffic, errors, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from headway.benchmarks.environment import environment
from headway.benchmarks.report_blocks import Block, Table, Word
from headway.benchmarks.report_parts import Part
from headway.benchmarks.soak_checks import (
    WARM_UP_SHARE,
    WINDOW_SHARE,
    Limit,
    Soak,
    by_kind,
    by_status,
    limits,
)
from headway.benchmarks.soak_parity import Kept
from headway.benchmarks.soak_watch import COUNTED

MAX_DETAILS = 30
"""Problems that are written out."""


def report(soak: Soak, facts: Mapping[str, Any], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that was seen and what follows from it, as JSON values.

    facts: model, dtype, seed and so on.
    """
    wrong = [each for each in soak.outcomes if each.problem is not None]
    details = [f"{each.kind}: {each.problem}: {each.detail}" for each in wrong]
    if soak.parity is not None:
        details += soak.parity.details
    found = [*warnings, *(f"the server: {each}" for each in (soak.gone, soak.ended_badly) if each)]
    found += [f"left out, {method}: {why}" for method, why in sorted(soak.left_out.items())]
    return {
        "benchmark": "soak",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        **facts,
        "seconds": soak.seconds,
        "warnings": found,
        "limits": [asdict(each) for each in limits(soak)],
        "traffic": by_kind(soak.outcomes, soak.seconds),
        "answers": by_status(soak.outcomes),
        "totals": totals(soak),
        "problems": details[:MAX_DETAILS],
        "memory": {"of": soak.memory_kind, "samples": [list(each) for each in soak.memory]},
        "parity": None
        if soak.parity is None
        else {
            **{str(kept): soak.parity.count(kept) for kept in Kept},
            "largest_difference": soak.parity.largest,
        },
    }


def totals(soak: Soak) -> dict[str, float | None]:
    """Requests and tokens of the whole soak."""
    counted = {name: soak.counted(name) for name in COUNTED}
    tokens = counted["output tokens"]
    return {
        "requests": len(soak.outcomes),
        "requests per second": len(soak.outcomes) / soak.seconds,
        **counted,
        "output tokens per second": None if tokens is None else tokens / soak.seconds,
    }


def broken(result: Mapping[str, Any]) -> list[str]:
    """The names of the limits that were not kept."""
    return [each["name"] for each in result["limits"] if Limit(**each).is_broken]


def table(result: Mapping[str, Any]) -> str:
    """The report for people."""
    width = max(len(each["name"]) for each in result["limits"])
    lines = ["", f"{'limit':<{width}} {'found':>8} {'at most':>8}  verdict"]
    for each in result["limits"]:
        note = f" ({each['note']})" if each["note"] else ""
        line = f"{each['name']:<{width}} {_value(each):>8} {_bound(each):>8}  {each['verdict']}"
        lines.append(f"{line}{note}")
    lines += ["", _row(TRAFFIC)]
    lines += [_row(cells) for cells in _traffic(result)]
    lines += ["", f"{'status':<8} {'reason':<22} {'answers':>8} {'problems':>8}"]
    lines += [f"{a:<8} {b:<22} {c:>8} {d:>8}" for a, b, c, d in _answers(result)]
    lines += ["", ", ".join(f"{name} {value}" for name, value in _totals(result)), ""]
    lines += [each[:300] for each in result["problems"]]
    facts = result["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    lines += [f"{result['seconds']:.0f} s, {result['concurrency']} at once, seed {result['seed']}"]
    lines += [f"{packages}; commit {facts['commit']}"]
    host = f"{facts['cpu']}, {facts['usable_threads']} threads"
    lines += [f"{result['model']}, {result['dtype']}; {facts['cuda_device'] or 'on CPU'}; {host}"]
    return "\n".join([*lines, *(f"warning: {each}" for each in result["warnings"])])


COUNTS = ("refused", "left", "problems")
TIMES = {
    "seconds_p50": "p50, s",
    "seconds_p99": "p99, s",
    "first_p50": "first, p50",
    "first_p99": "first, p99",
}
TRAFFIC = ("kind of traffic", "requests", "per s", *COUNTS, *TIMES.values())


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<30}" + "".join(f" {each:>10}" for each in cells[1:])


def _traffic(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            each["kind"],
            str(each["requests"]),
            f"{each['per_second']:.2f}",
            *(str(each[name]) for name in COUNTS),
            *(_seconds(each[name]) for name in TIMES),
        )
        for each in result["traffic"]
    ]


def _answers(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (str(each["status"] or "none"), each["reason"] or "", str(each["answers"]),
         str(each["problems"]))
        for each in result["answers"]
    ]  # fmt: skip


def _totals(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, each) for name, each in result["totals"].items() if each is not None]
    return [(name, f"{each:,.1f}".removesuffix(".0")) for name, each in found]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _value(limit: Mapping[str, Any]) -> str:
    value = limit["value"]
    if value is None:
        return ""
    return f"{value:.1%}" if limit["unit"] == "share" else f"{value:g}"


def _bound(limit: Mapping[str, Any]) -> str:
    return f"{limit['limit']:.0%}" if limit["unit"] == "share" else f"{limit['limit']:g}"


def blocks(part: Part) -> list[Block]:
    """The tables of `headway bench report`."""
    result = part.result
    limited = [
        (each["name"], _value(each), _bound(each), Word(each["verdict"]), each["note"])
        for each in result["limits"]
    ]
    note = (
        f"{result['seconds'] / 60:.1f} minutes, {result['concurrency']} requests at a time. Growth "
        f"is from after the warm-up of {WARM_UP_SHARE:.0%} to the end, medians over "
        f"{WINDOW_SHARE:.0%} of the time."
    )
    columns = ("limit", "found", "at most", "verdict", "note")
    return [
        Table("Soak: limits", columns, limited, part.source, note),
        Table("Soak: traffic", TRAFFIC, _traffic(result), part.source),
        Table("Soak: totals", ("what", "value"), _totals(result), part.source),
    ]
