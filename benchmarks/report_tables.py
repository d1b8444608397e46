"""The tables of `headway bench report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from headway.benchmarks.report_blocks import Table, Word, bar, interval, number, word
from headway.benchmarks.report_parts import MALFORMED, METRICS, Finding, Part, findings

SETTINGS = ("engine_settings", "server_settings")
NOT_FACTS = {"benchmark", "date", "measured", "step_seconds"}
TIMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "cold_e2e": "cold E2E",
}
PERCENTILES = ("p50", "p90", "p99")


def facts(part: Part) -> dict[str, str]:
    """What a run depended on: its environment and its options. Raises PartError."""
    try:
        return _facts(part)
    except MALFORMED as error:
        raise part.error(error) from None


def _facts(part: Part) -> dict[str, str]:
    result = part.result
    found = {key: value for key, value in result.items() if key not in NOT_FACTS}
    found |= part.environment
    found |= {name: version for name, version in (found.pop("packages", None) or {}).items()}
    for name in SETTINGS:
        found |= found.pop(name, None) or {}
    if part.key == "overhead":
        first = result["scenarios"][0]
        found |= {name: first[name] for name in ("dtype", "enforce_eager")}
        # A merged report has their number in place of the runs.
        found["rounds"] = first["rounds"] if "rounds" in first else len(first["runs"])
    return {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in ((name, "none" if v is None else v) for name, v in found.items())
        if isinstance(value, str | int | float)
    }


def environment_tables(parts: Sequence[Part]) -> list[Table]:
    """The facts that all runs share, and those in which they differ."""
    every = [facts(part) for part in parts]
    names = list(dict.fromkeys(name for found in every for name in found))
    shared, differing = [], []
    for name in names:
        values = [found.get(name, "") for found in every]
        if len(set(values)) == 1:
            shared.append((name, values[0]))
        else:
            differing.append((name, *values))
    files = [(part.key, part.source) for part in parts]
    tables = [Table("The runs", ("benchmark", "file and date"), files)]
    title = "The same in all runs" if len(parts) > 1 else "Facts"
    tables.append(Table(title, ("fact", "value"), shared))
    if differing:
        columns = ("fact", *(part.key for part in parts))
        tables.append(Table("Different in some run", columns, differing))
    return tables


def bars(parts: Sequence[Part]) -> Table:
    """Every comparison that has a bar."""
    rows, kinds = [], Counter[str]()
    for part in parts:
        for found in findings(part):
            if found.bar is None:
                continue
            verdict = Word(word(found))
            kinds[verdict.kind] += 1
            rows.append(
                (
                    found.name,
                    found.metric,
                    number(found.value),
                    interval(found),
                    bar(found),
                    verdict,
                    f"{part.key}: {part.source}",
                )
            )
    columns = ("name", "metric", "ratio", "95 % interval", "bar", "verdict", "source")
    note = (
        f"{len(rows)} with a bar: {kinds['holds']} held, {kinds['fails']} failed, "
        f"{kinds['undecided']} undecided. Only what these runs compared is here."
    )
    return Table("Every comparison that has a bar", columns, rows, note=note)


def comparisons(part: Part, title: str, metrics: Sequence[str] = (), note: str = "") -> Table:
    """All that a part compares by these metrics, or by all."""
    rows = [
        (
            found.name,
            found.metric,
            number(found.value),
            interval(found),
            bar(found),
            word(found),
        )
        for found in findings(part)
        if not metrics or found.metric in metrics
    ]
    columns = ("comparison", "metric", "ratio", "95 % interval", "bar", "verdict")
    if any(found.unit for found in findings(part)):
        columns = (*columns[:2], "value", *columns[3:])
    return Table(title, columns, rows, part.source, note)


def matrix(
    title: str, rows: Mapping[str, Mapping[int, Finding]], axis: str, source: str, note: str = ""
) -> Table:
    """Ratios and intervals: a row for each label, a column for each place on an axis."""
    places = sorted({place for found in rows.values() for place in found})
    cells = [
        (label, *(_both(found[place]) if place in found else "" for place in places))
        for label, found in rows.items()
    ]
    return Table(title, ("", *(f"{axis} {place}" for place in places)), cells, source, note)


def latency(part: Part) -> Table:
    """Percentiles of every time, of every cell."""
    cells, rows = part.result["cells"], []
    # Those that the file has: older ones have no cold E2E.
    found = [name for name in TIMES if all(f"{name}_ms" in cell for cell in cells)]
    for cell in cells:
        times = [cell[f"{name}_ms"] for name in found]
        columns = [" / ".join(f"{each[p]:.1f}" for p in PERCENTILES) for each in times]
        rows.append((cell["name"], f"{cell['tokens_per_second']:.1f}", *columns))
    heads = (f"{TIMES[name]}, ms" for name in found)
    note = (
        "p50 / p90 / p99 over the requests of all rounds. TTFT: to the first token, the prompt not "
        "cached; TPOT: per token after it; ITL: between two chunks; E2E: to the last token. It and "
        "tokens/s are of prompts in the prefix cache; pictures are computed again. Cold E2E: TTFT, "
        "and what E2E has after the first token."
    )
    return Table("Latency", ("load", "tokens/s", *heads), rows, part.source, note)


def memory(part: Part) -> Table:
    """Resident memory of the servers."""
    rows = [
        (name, f"{used['rss_mib']:,.0f}", f"{used['peak_mib']:,.0f}")
        for name, used in part.result["memory"].items()
    ]
    columns = ("server", "at the end, MiB", "most, MiB")
    return Table("Memory of the servers", columns, rows, part.source)


def time_ratios(part: Part) -> Table:
    """Times of serving relative to the baseline, a column for each."""
    rows: dict[str, dict[str, str]] = {}
    for found in findings(part):
        rows.setdefault(found.name, {})[found.metric] = _both(found)
    told = {metric for row in rows.values() for metric in row}
    columns = [METRICS[name] for name in TIMES if METRICS.get(name) in told]
    cells = [(name, *(row.get(column, "") for column in columns)) for name, row in rows.items()]
    note = "Medians, relative to the same load on the baseline; less is better."
    title = "Times relative to the baseline"
    return Table(title, ("comparison", *columns), cells, part.source, note)


def peers(part: Part) -> list[Table]:
    """Speeds, what each system does right, and those that could not run."""
    rows = sorted(part.result["rows"], key=lambda row: (row["method"], row["system"]))
    speeds, correct = [], []
    names = list(dict.fromkeys(name for row in rows for name in row["properties"]))
    for row in rows:
        system = f"{row['system']} {row['version'] or ''}".strip()
        ours = f"{row['headway_tokens_per_second']:.2f}"
        both = number(row["ratio"])
        ends = f"{number(row['low'])} .. {number(row['high'])}" if both else ""
        start = (row["method"], system, str(row["concurrency"]))
        theirs = f"{row['tokens_per_second']:.2f}"
        speeds.append((*start, theirs, ours, both, ends, str(row["notes"] or "")))
        found = (row["properties"].get(name, "not tested") for name in names)
        cells = (each if each == "not applicable" else Word(each) for each in found)
        correct.append((*start[:2], *cells))
    heads = ["method", "system", "requests at once", "tokens/s", "Headway's tokens/s"]
    heads += ["Headway / it", "95 % interval", "notes"]
    rounds = part.result.get("rounds")  # which older files lack
    note = f"{rounds} rounds; of two or three an interval is very wide." if rounds else ""
    tables = [Table("Speed", heads, speeds, part.source, note)]
    heads = ["method", "system", *(name.replace("_", " ") for name in names)]
    tables.append(Table("Correctness", heads, correct, part.source))
    if lost := part.result["unavailable"]:
        keys = ("system", "method", "reason", "command")
        rows = [tuple(str(row[key]) for key in keys) for row in lost]
        tables.append(Table("Could not run here", keys, rows, part.source))
    return tables


def sgrs(part: Part) -> Table:
    """Time per output token of every arm."""
    result = part.result
    rows = [
        (row["name"], f"{1000 * row['seconds']:.1f}", f"{row['spread']:.1%}")
        for row in result["arms"]
    ]
    drawn, seconds = (fmean(result[key]) for key in ("draws_per_token", "seconds_per_evaluation"))
    note = (
        f"Mean context {result['context']} tokens, {result['output_tokens']} output tokens a "
        f"request; {drawn:.2f} candidates drawn for a token, as published {seconds:.2f} s for each."
    )
    columns = ("arm", "ms per output token", "spread")
    return Table("SGRS: time per output token", columns, rows, part.source, note)


def head_selection(part: Part) -> Table:
    """Medians of the times to the first token, and mean speeds."""
    rows = []
    for name, timings in part.result["first_token"].items():
        seconds = median(row["seconds"] for row in timings)
        rows.append((name, "time to first token, median ms", f"{1000 * seconds:.1f}"))
    for name, timings in part.result["decode"].items():
        speed = fmean(row["tokens"] / row["seconds"] for row in timings)
        rows.append((name, f"tokens/s, {part.result['batch']} at once, mean", f"{speed:.1f}"))
    columns = ("kind of request", "what", "value")
    return Table("Head selection by the prompt", columns, rows, part.source)


def vectors(part: Part) -> Table:
    """What a profile did to answers, by arm."""
    result = part.result
    rows = []
    for row in result["arms"]:
        gained = row.get("target_share_gained")
        rows.append(
            (
                row["name"],
                _figure(row["target_share"]),
                _figure(gained) if gained else "",
                _figure(row["well_formed"]),
                f"{row['repeated']:.3f}",
                f"{row['perplexity']:.2f}",
            )
        )
    columns = ["arm", f"answers in {result['target']}", "gained on unsteered", "well formed"]
    note = (
        f"{result['prompts']} held-out prompts, greedy; shares with 95 % intervals over prompts. "
        "The language of an answer is told by a heuristic."
    )
    columns += ["repeated", "perplexity of neutral text"]
    return Table("A vector profile's effect", columns, rows, part.source, note)


def _both(found: Finding) -> str:
    return f"{number(found.value)} ({interval(found)})"


def _figure(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return ""
    return f"{number(found['value'])} ({number(found['low'])} .. {number(found['high'])})"
