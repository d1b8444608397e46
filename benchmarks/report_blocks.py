"""What the sections of a report are made of, whatever it is written as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headway.benchmarks.report_parts import Finding
from headway.benchmarks.statistics import Verdict


class Word(str):
    """A verdict in a cell of a table, in the words of the benchmark."""

    @property
    def kind(self) -> str:
        """Which of three looks it has: "holds", "fails" or "undecided"."""
        decided = (Verdict.HOLDS, Verdict.FAILS)
        return str(self) if self in decided else "undecided"


@dataclass(frozen=True)
class Table:
    """source: the file and date of its figures, unless its rows or columns name them.

    note: what must be known to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    source: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """svg: of an element that takes its text's colour from where it is; name: of its file."""

    title: str
    name: str
    svg: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: "note", "warning", "heading" or "missing"."""

    text: str
    kind: str = "note"


Block = Table | Plot | Text


@dataclass
class Section:
    """A heading and what is below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def number(value: float | None) -> str:
    """A ratio with three decimals, a large one with one; empty where there is none."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def interval(found: Finding) -> str:
    """Both ends of an interval."""
    return f"{number(found.low)} .. {number(found.high)}"


def bar(found: Finding) -> str:
    """The bar in words, empty where there is none."""
    if found.bar is None:
        return ""
    unit = f" {found.unit}" if found.unit else ""
    return f"{'at most' if found.at_most else 'at least'} {found.bar:g}{unit}"


def word(found: Finding) -> str:
    """The verdict of the benchmark; where it gave none on a bar, that is said."""
    if found.verdict is None:
        return Word("no verdict given") if found.bar is not None else ""
    return Word(found.verdict)
