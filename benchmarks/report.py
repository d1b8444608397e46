"""One report of what the benchmarks found, with tables and plots, from their JSON files.

    headway bench report

Measures nothing. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headway.benchmarks.options import RESULTS
from headway.benchmarks.report_pages import markdown, page, plot_files
from headway.benchmarks.report_parts import REPORT, Part, PartError, gather
from headway.benchmarks.report_sections import sections

NAME = "headway bench report"
TITLE = "Headway: what was measured"
MERGED = "report.json"
RUNS = frozenset(
    {
        "answers",
        "compiled",
        "decode",
        "draws_per_token",
        "first_token",
        "runs",
        "samples",
        "seconds_per_evaluation",
    }
)
"""Keys of what is long, a value for every run or answer; it stays in the file of its benchmark."""


def main(argv: Sequence[str]) -> int:
    """Write the report: 0, or 2 for files that are no reports of benchmarks, 1 for other errors."""
    args = build_parser().parse_args(argv)
    now = datetime.now(UTC)
    try:
        parts, passed_over = gather(args.given or [RESULTS])
        folder = args.output or RESULTS / f"report-{now:%Y%m%dT%H%M%SZ}"
        write(parts, passed_over, folder, args.title, now)
    except PartError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    for part in parts.values():
        print(f"{part.key:<16} {part.path}")
    for line in passed_over:
        print(f"passed over: {line}")
    print(f"written to {folder}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Write one report of what the benchmarks found."
    )
    parser.add_argument(
        "given",
        nargs="*",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="JSON of benchmarks, the newest of each; all in benchmarks/results/ by default",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--title", default=TITLE, help="%(default)r by default")
    return parser


def write(
    parts: Mapping[str, Part], passed_over: Sequence[str], folder: Path, title: str, now: datetime
) -> None:
    """Make the folder with the report in it. Raises PartError before anything is written, OSError.

    parts: with their raw JSON, which is copied.
    """
    named = _named(parts)
    found = sections(named, passed_over)
    date = f"{now:%Y-%m-%d %H:%M} UTC"
    files = {
        "report.html": page(title, date, found),
        "report.md": markdown(title, date, found),
        MERGED: json.dumps(merged(named, title, now), indent=2) + "\n",
        **plot_files(found),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for part in named.values():
        (folder / part.file).write_bytes(part.raw)
    for name, text in files.items():
        (folder / name).write_text(text)


def merged(parts: Mapping[str, Part], title: str, now: datetime) -> dict[str, Any]:
    """All parts in one JSON value, without `RUNS`; environment: the facts that all share."""
    environments = [part.environment for part in parts.values()]
    first = environments[0]
    shared = {
        name: value
        for name, value in first.items()
        if all(name in each and each[name] == value for each in environments)
    }
    return {
        "benchmark": REPORT,
        "title": title,
        "date": now.isoformat(timespec="seconds"),
        "environment": shared,
        "files": {key: part.file for key, part in parts.items()},
        "parts": {key: _without_runs(part.result) for key, part in parts.items()},
    }


def _named(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts with the names that their files have in the report, each another."""
    taken = {MERGED}
    named = {}
    for key, part in parts.items():
        name = part.path.name
        while name in taken:
            name = f"{key}-{name}"
        taken.add(name)
        named[key] = replace(part, file=name)
    return named


def _without_runs(value: Any) -> Any:
    """A JSON value without `RUNS`; of a list of runs it keeps how many there were."""
    if isinstance(value, dict):
        kept = {
            name: _without_runs(each)
            for name, each in value.items()
            if not (name in RUNS and isinstance(each, list | dict))
        }
        runs = value.get("runs")
        return kept | {"rounds": len(runs)} if isinstance(runs, list) else kept
    return [_without_runs(each) for each in value] if isinstance(value, list) else value
