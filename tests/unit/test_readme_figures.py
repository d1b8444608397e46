"""Figures of speed in the README come from the report that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def section(title: str) -> str:
    """A section of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a Markdown text, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return [each for each in cells if each[0] and set(each[0]) != {"-"} and each[0] != "name"]


def test_every_row_of_the_benchmark_table_is_one_of_the_committed_report():
    benchmark = section("Benchmark")
    (folder,) = set(re.findall(r"\((benchmarks/results/[^)/]+)/report\.md\)", benchmark))
    report = rows((ROOT / folder / "report.md").read_text(encoding="utf-8"))
    shown = rows(benchmark)
    assert len(shown) > 5
    for row in shown:
        assert any(found[: len(row)] == row for found in report), row


def test_the_report_has_its_page_its_data_and_no_machine_paths():
    (folder,) = set(re.findall(r"\((benchmarks/results/[^)/]+)/report\.md\)", section("Benchmark")))
    files = list((ROOT / folder).iterdir())
    assert {"report.html", "report.md", "report.json"} <= {each.name for each in files}
    assert sum(each.stat().st_size for each in files) < 4 * 2**20
    for each in files:
        text = each.read_text(encoding="utf-8")
        assert "/root/" not in text and "/home/" not in text and "/tmp/" not in text, each.name
