"""The JSON files of the benchmarks, as `headway bench report` and `compare` read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

REPORT = "report"
MODELLED = "kernels-static"
"""What `headway bench kernels --static` writes, told apart from what was measured."""
COMMANDS = {
    "overhead": "headway bench overhead",
    "serve": "headway bench serve",
    "peers": "headway bench peers",
    "sgrs": "headway bench sgrs",
    "head-selection": "headway bench head-selection --json FILE",
    "vectors": "headway bench vectors --profile FILE",
    "profile-loading": "headway bench profile-loading",
    "soak": "headway bench soak",
    "kernels": "headway bench kernels --json FILE",
    MODELLED: "headway bench kernels --static --json FILE",
}
"""Key of a part -> the command that writes its file."""
METRICS = {
    "tokens_per_second": "tokens/s",
    "ttft": "TTFT",
    "tpot": "TPOT",
    "e2e": "E2E",
    "cold_e2e": "cold E2E",
}
LOAD = ("prompt_tokens", "output_tokens")
"""What a comparison of `overhead` says of its load."""
TOKENS_PER_SECOND = METRICS["tokens_per_second"]
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What reading a JSON of another shape raises."""


class PartError(ValueError):
    """A file is not the report of a benchmark; one line that names it."""


@dataclass(frozen=True)
class Finding:
    """A ratio, or a figure in a unit, with its 95 % interval.

    at_most: less is better, and a bar the most that it may be. verdict: as the benchmark gave it.
    unit: empty for a ratio; s: a time of one machine. load: what was asked for, where the name does
    not say it.
    """

    name: str
    metric: str
    value: float
    low: float
    high: float
    bar: float | None = None
    verdict: str | None = None
    at_most: bool = False
    unit: str = ""
    load: str = ""

    @property
    def absolute(self) -> bool:
        """Whether it says something of the machine as well."""
        return self.unit == "s"


@dataclass(frozen=True)
class Part:
    """What one run of a benchmark wrote. key: of `COMMANDS`; file: what the report calls it."""

    key: str
    path: Path
    result: dict[str, Any]
    raw: bytes = b""
    file: str = ""

    @cached_property
    def date(self) -> datetime:
        """When it was measured. Raises PartError."""
        try:
            found = datetime.fromisoformat(self.result["date"])
        except MALFORMED as error:
            raise self.error(error) from None
        return found if found.tzinfo else found.replace(tzinfo=UTC)

    @property
    def source(self) -> str:
        """The file and its date, which every figure names."""
        return f"{self.file or self.path.name}, {self.date:%Y-%m-%d %H:%M} UTC"

    @property
    def environment(self) -> dict[str, Any]:
        """The facts that its figures depend on. Raises PartError."""
        found = self.result.get("environment")
        if not isinstance(found, dict):
            raise self.error(ValueError("no environment"))
        return found

    @property
    def warnings(self) -> list[str]:
        """What the benchmark warned of; of an unclean checkout as well."""
        found = [str(each) for each in self.result.get("warnings") or []]
        commit = self.environment.get("commit")
        if commit and str(commit).endswith("-dirty"):
            found.append(f"run with changes that are not in commit {commit}")
        return found

    def error(self, error: Exception) -> PartError:
        """What to raise if something is not where it should be."""
        if isinstance(error, PartError):
            return error
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        command = COMMANDS.get(self.key, "a benchmark").partition(" --")[0]
        return PartError(f"{self.path}: not as `{command}` writes it: {what}")


def read(path: Path) -> dict[str, Part]:
    """The parts in a file by their keys: one, or those of a merged report. Raises PartError."""
    try:
        raw = path.read_bytes()
        result = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"no JSON: {error}"
        raise PartError(f"{path}: {reason}") from None
    if not isinstance(result, dict) or not isinstance(result.get("benchmark"), str):
        raise PartError(f"{path}: not the report of a benchmark")
    if result["benchmark"] != REPORT:
        return {part.key: part for part in [_part(path, result, raw)]}
    parts = result.get("parts")
    if not isinstance(parts, dict) or not all(isinstance(each, dict) for each in parts.values()):
        raise PartError(f"{path}: a report without parts")
    return {part.key: part for part in (_part(path, each) for each in parts.values())}


def gather(paths: Sequence[Path]) -> tuple[dict[str, Part], list[str]]:
    """The newest part of every benchmark in these files and folders, and what was passed over.

    Of a folder, the JSON files directly in it. Raises PartError for a named file that is none,
    and if nothing is found.
    """
    chosen: dict[str, Part] = {}
    passed_over = []
    named = {path.resolve(): path for path in paths if not path.is_dir()}
    folders = [path for path in paths if path.is_dir()]
    listed = {file.resolve(): file for path in folders for file in sorted(path.glob("*.json"))}
    for resolved, file in (listed | named).items():
        try:
            part = _measured(file)
        except PartError as error:
            if resolved in named:
                raise
            passed_over.append(str(error))
            continue
        if other := chosen.get(part.key):
            other, part = sorted((other, part), key=lambda each: each.date)
            passed_over.append(f"{other.path}: {part.path.name} is newer, of `{_command(part)}`")
        chosen[part.key] = part
    if not chosen:
        where = ", ".join(map(str, paths))
        raise PartError(f"{where}: no report of a benchmark; `headway bench` lists what writes one")
    return {key: chosen[key] for key in COMMANDS if key in chosen}, passed_over


def findings(part: Part) -> list[Finding]:
    """What a part compares, with bars or without. Raises PartError."""
    try:
        return list(_READERS[part.key](part.result))
    except MALFORMED as error:
        raise part.error(error) from None


def _part(path: Path, result: dict[str, Any], raw: bytes = b"") -> Part:
    key = result.get("benchmark")
    if key == "kernels" and result.get("measured") is False:
        key = MODELLED
    if key not in COMMANDS:
        raise PartError(f"{path}: the benchmark {key!r} has no place in a report")
    part = Part(str(key), path, result, raw)
    _ = part.date, part.environment, findings(part)
    return part


def _measured(path: Path) -> Part:
    """The only part of a file. Raises PartError for a merged report, which lacks the runs."""
    for part in read(path).values():
        if part.raw:
            return part
    raise PartError(f"{path}: a merged report; name the files that it was made of")


def _command(part: Part) -> str:
    return COMMANDS[part.key].removesuffix(" --json FILE")


def _finding(row: dict[str, Any], name: str, metric: str, value: str, **facts: Any) -> Finding:
    bar, verdict = row.get("bar"), row.get("verdict")
    return Finding(
        name,
        metric,
        float(row[value]),
        float(row["low"]),
        float(row["high"]),
        None if bar is None else float(bar),
        None if verdict is None else str(verdict),
        **facts,
    )


def _overhead(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["comparisons"]:
        load = ", ".join(f"{name} {row[name]}" for name in LOAD if name in row)
        yield _finding(row, row["name"], TOKENS_PER_SECOND, "ratio", load=load)


def _serve(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["comparisons"]:
        metric = METRICS[row["metric"]]
        at_most = metric != TOKENS_PER_SECOND
        yield _finding(row, row["name"], metric, "ratio", at_most=at_most)


def _peers(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["rows"]:
        if row["ratio"] is not None:  # as it is for Headway itself
            name = f"{row['method']}: Headway / {row['system']}, {row['concurrency']} at once"
            yield _finding(row, name, TOKENS_PER_SECOND, "ratio")


def _sgrs(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["comparisons"]:
        metric = "time per output token"
        yield _finding(row, row["name"], metric, "value", at_most=bool(row["at_most"]))


def _head_selection(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["comparisons"]:
        metric = "time to first token" if row["kind"] == "first token" else TOKENS_PER_SECOND
        name = f"{row['condition']} / unsteered"
        yield _finding(row, name, metric, "value", at_most=bool(row["at_most"]))


def _profile_loading(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["comparisons"]:
        facts = {"at_most": bool(row["at_most"]), "unit": str(row["unit"])}
        yield _finding(row, row["name"], row["unit"], "value", **facts)


def _vectors(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["arms"]:
        if row["profile"] != "profile":  # unsteered, and the control of drawn directions
            continue
        shares = (("target_share", f"in {result['target']}"), ("well_formed", "well formed"))
        for key, words in shares:
            metric = f"share of answers {words}"
            yield _finding(row[key], row["name"], metric, "value", unit="share")


def _soak(result: dict[str, Any]) -> Iterator[Finding]:
    _ = result["limits"], result["traffic"], result["totals"]  # no ratios; they have a table
    yield from ()


def _kernels(result: dict[str, Any]) -> Iterator[Finding]:
    for row in result["cases"]:
        if "error" not in row:
            name = f"{row['kernel']}: {row['case']}"
            facts = {"at_most": True, "unit": "s"}
            yield _finding(row["seconds"], name, "median, quartiles", "median", **facts)


def _modelled(result: dict[str, Any]) -> Iterator[Finding]:
    _ = result["modelled"]["cases"]  # in which nothing was measured
    yield from ()


_READERS: dict[str, Callable[[dict[str, Any]], Iterator[Finding]]] = {
    "overhead": _overhead,
    "serve": _serve,
    "peers": _peers,
    "sgrs": _sgrs,
    "head-selection": _head_selection,
    "vectors": _vectors,
    "profile-loading": _profile_loading,
    "soak": _soak,
    "kernels": _kernels,
    MODELLED: _modelled,
}
