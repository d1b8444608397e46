"""`headway bench report`, of JSON that the benchmarks' own code made of made-up measurements."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from headway.benchmarks import report
from headway.benchmarks.report_blocks import Plot, Section, Table, Text, Word
from headway.benchmarks.report_pages import markdown, page
from headway.benchmarks.report_parts import COMMANDS, PartError, findings, gather, read
from headway.benchmarks.report_plots import forest
from tests.bench_reports import DATE, REPORTS, WARNING, write_all

pytestmark = pytest.mark.unit

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """The text of a page by section, its tags with their attributes, and whether they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.sections: list[str] = []
        self.verdicts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.sections.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if self.sections and tag in ("td", "th", "p", "h2", "h3", "figcaption"):
            self.sections[-1] += " "

    def handle_data(self, data: str) -> None:
        if self.sections and "svg" not in self.open:
            self.sections[-1] += data
        attributes = self.tags[-1][1] if self.tags else {}
        if (attributes.get("class") or "").startswith("verdict ") and self.open[-1] == "span":
            self.verdicts.append((str(attributes["class"]), data))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of every benchmark."""
    return write_all(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def folder(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all of them."""
    output = tmp_path_factory.mktemp("written") / "report"
    given = str(made["serve"].parent)
    assert report.main([given, "--output", str(output), "--title", "All <of> it"]) == 0
    return output


@pytest.fixture(scope="module")
def shown(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def parts_of(made: dict[str, Path]) -> dict[str, Any]:
    return {key: read(path)[key] for key, path in made.items()}


def section(shown: Page, title: str) -> str:
    (found,) = (text for text in shown.sections if text.startswith(title))
    return " ".join(found.split())


# The page


def test_the_page_needs_nothing_but_itself(folder: Path, shown: Page) -> None:
    text = (folder / "report.html").read_text()
    assert shown.open == [] and "http://" not in text and "https://" not in text
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in shown.tags:
        assert not attributes.keys() & {"src", "srcset", "data", "action"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert set(re.findall(r"url\((.)", text)) <= {"#"} and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "All &lt;of&gt; it" in text


def test_plots_take_the_colours_of_the_page_and_have_ids_of_their_own(shown: Page) -> None:
    svgs = [attributes for tag, attributes in shown.tags if tag == "svg"]
    assert len(svgs) == 8
    ids = [attributes["id"] for _, attributes in shown.tags if attributes.get("id")]
    assert len(ids) == len(set(ids)) > len(svgs)
    referred = {str(a["xlink:href"])[1:] for _, a in shown.tags if a.get("xlink:href")}
    assert referred and referred <= set(ids)


def test_every_warning_is_shown_first(made: dict[str, Path], shown: Page) -> None:
    first = section(shown, "1. What was measured")
    for key, part in parts_of(made).items():
        for warning in part.warnings:
            assert warning in first, key
    assert WARNING in first and "as published 0.20000" in first
    warned = [a for tag, a in shown.tags if tag == "p" and a.get("class") == "warning"]
    assert len(warned) >= 2


def test_facts_of_all_runs_are_there(made: dict[str, Path], shown: Page) -> None:
    first = section(shown, "1. What was measured")
    facts = parts_of(made)["serve"].environment
    for fact in (facts["cpu"], facts["commit"], facts["packages"]["torch"], "demo-vlm", "float32"):
        assert str(fact) in first
    assert "VLLM_CPU_KVCACHE_SPACE" in first
    for path in made.values():
        assert path.name in first


def test_bars_have_the_verdicts_of_the_files(made: dict[str, Path], folder: Path) -> None:
    expected = [
        (found.name, found.verdict)
        for part in parts_of(made).values()
        for found in findings(part)
        if found.bar is not None
    ]
    assert {"holds", "fails"} <= {verdict for _, verdict in expected}
    _, text = (folder / "report.md").read_text().split("## 2. Bars")
    table = text.partition("## 3.")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"][2:]
    assert [(row[0], row[5].strip("*")) for row in rows] == expected
    assert all(row[5].startswith("**") for row in rows)
    stated = re.search(r"(\d+) with a bar: (\d+) held, (\d+) failed, (\d+) undecided", table)
    assert stated is not None
    total, held, failed, rest = map(int, stated.groups())
    assert total == len(expected) == held + failed + rest
    assert failed == sum(verdict == "fails" for _, verdict in expected)


def test_a_failed_and_an_undecided_bar_look_like_that() -> None:
    rows = [[Word("fails")], [Word("holds")], [Word("too noisy to tell")]]
    found = Page(page("t", "d", [Section("s", [Table("t", ("v",), rows, "f.json")])])).verdicts
    assert found == [
        ("verdict fails", "fails"),
        ("verdict holds", "holds"),
        ("verdict undecided", "too noisy to tell"),
    ]


def test_a_failed_bar_is_shown_as_failed(shown: Page) -> None:
    bars = section(shown, "2. Bars")
    assert "gact / idle, 16 at once, context 512 tokens/s 0.951" in bars
    assert ("verdict fails", "fails") in shown.verdicts
    loading = section(shown, "7. Single methods").partition("stall of others")[2]
    assert loading.split("fails")[0].strip().endswith("at most 1 steps")


def test_every_figure_names_its_file_and_date(made: dict[str, Path], shown: Page) -> None:
    captions = sum(tag == "figcaption" for tag, _ in shown.tags)
    text = " ".join(" ".join(shown.sections).split())
    # The environment's tables and that of the bars have the files in rows or columns.
    assert (
        len(re.findall(r"From [\w-]+-made\.json, 2026-11-\d\d 10:00 UTC\.", text)) >= captions - 4
    )
    for day, key in enumerate(REPORTS, start=1):
        assert f"Run: {key}-made.json, {DATE.format(day)[:10]} 10:00 UTC" in text


def test_times_of_different_runs_are_told_apart(shown: Page) -> None:
    for title, runs in (("3.", 2), ("4.", 2), ("7.", 4)):
        assert f"From {runs} runs at different times" in section(shown, title)
    assert "runs at different times" not in section(shown, "5.")


def test_latencies_growth_and_peers(shown: Page) -> None:
    assert re.search(
        r"idle, 16 at once, context 512 \d+\.\d \d+\.\d / \d+\.\d", section(shown, "5.")
    )
    assert "headway 3,816 3,900" in section(shown, "5.")
    growth = section(shown, "4.")
    assert "locore / idle, 4 at once 0.8" in growth and "context 4096" in growth
    assert "locore / itself with 1" in growth
    peers = section(shown, "6.")
    assert "not applicable" in peers and "one batch | padded <left>" in peers
    assert "needs a CUDA device pip install vllm-lens && python -m vllm_lens" in peers


# Kernels


def test_modelled_figures_are_labelled(folder: Path, shown: Page) -> None:
    measured, modelled = section(shown, "8a. "), section(shown, "8b. ")
    assert modelled.startswith("8b. Kernels: modelled, not measured")
    assert "modelled" not in measured.lower() and "roofline" not in measured.lower()
    assert "20.00" in measured and "sink_tags: 2048 rows" in modelled
    assert "sink_tags" not in measured
    lines = (folder / "report.md").read_text().splitlines()
    heads = [line for line in lines if line.startswith("| kernel | MB")]
    columns = heads[0].split(" | ")[3:]
    assert columns and all("modelled" in column for column in columns)
    plot = (folder / "kernels-modelled.svg").read_text()
    words = re.findall(r">([^<>]+)</text>", plot)
    assert words.count("modelled microseconds a call") == 2
    assert {"A100-80GB-SXM, modelled", "roofline, modelled"} <= set(words)


def test_what_did_not_compile_is_told(shown: Page) -> None:
    assert "did not compile: ptxas said no" in section(shown, "8c. ")


# The files


def test_what_is_written(made: dict[str, Path], folder: Path) -> None:
    for path in made.values():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    merged = json.loads((folder / "report.json").read_text())
    assert merged["benchmark"] == "report" and set(merged["parts"]) == set(REPORTS)
    assert (
        merged["environment"]["cpu"] == json.loads(made["serve"].read_text())["environment"]["cpu"]
    )
    text = json.dumps(merged["parts"])
    assert '"runs"' not in text and '"answers"' not in text
    assert '"first_token": "holds"' in text  # a property of peers, no list of runs
    kept = merged["parts"]["serve"]["comparisons"]
    assert kept == json.loads(made["serve"].read_text())["comparisons"]
    for key, part in read(folder / "report.json").items():
        assert findings(part) == findings(read(made[key])[key])


def test_the_plots_beside_the_summary_bring_what_they_need(folder: Path) -> None:
    named = set(re.findall(r"!\[.*?\]\((.*?)\)", (folder / "report.md").read_text()))
    assert named == {path.name for path in folder.glob("*.svg")} and len(named) == 8
    for name in named:
        root = ElementTree.parse(folder / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "background-color" in root.attrib["style"]


def test_tables_of_the_summary_have_as_many_cells_as_columns(folder: Path) -> None:
    width = 0
    for line in (folder / "report.md").read_text().splitlines():
        width = 0 if not line.startswith("|") else width or line.count("|")
        assert line.count("|") == width or width == 0


def test_empty_sections_name_their_command(made: dict[str, Path], tmp_path: Path) -> None:
    assert report.main([str(made["sgrs"]), "--output", str(tmp_path)]) == 0
    text = " ".join(Page((tmp_path / "report.html").read_text()).sections)
    for key, command in COMMANDS.items():
        assert (f"No data: {command} makes it." in text) is (key != "sgrs")
    assert list(tmp_path.glob("*.svg")) == []


def test_a_run_with_one_context_says_what_is_missing(tmp_path: Path) -> None:
    result = REPORTS["overhead"]()
    result["comparisons"] = result["comparisons"][:2]
    (tmp_path / "o.json").write_text(json.dumps(result))
    assert report.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Growth with context: this run has no two to compare." in text


def test_a_file_without_cold_end_to_end_times_is_shown(tmp_path: Path) -> None:
    result = REPORTS["serve"]()
    for new in (True, False):
        (tmp_path / "s.json").write_text(json.dumps(result))
        assert report.main([str(tmp_path / "s.json"), "--output", str(tmp_path / "out")]) == 0
        text = (tmp_path / "out" / "report.md").read_text()
        assert ("| cold E2E, ms |" in text) is new and "| E2E, ms |" in text
        for cell in result["cells"]:
            cell.pop("cold_e2e_ms", None)
        rows = result["comparisons"]
        result["comparisons"] = [row for row in rows if row["metric"] != "cold_e2e"]


# What is read


def small(day: int, **fields: Any) -> str:
    """The report of a benchmark that compared nothing."""
    environment = {"cpu": "small", "commit": "abc"}
    facts = {"benchmark": "profile-loading", "date": DATE.format(day), "environment": environment}
    return json.dumps({**facts, "comparisons": [], **fields})


def test_the_newest_of_a_benchmark_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, day in (("a", 3), ("b", 9), ("c", 5)):
        (tmp_path / f"{name}.json").write_text(small(day))
    (tmp_path / "other.json").write_text('{"list": []}')
    (tmp_path / "quality.json").write_text(small(1, benchmark="quality"))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "newer.json").write_text(small(20))
    parts, passed_over = gather([tmp_path])
    assert parts["profile-loading"].path.name == "b.json"
    assert len(passed_over) == 4
    assert report.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for name in ("a.json", "c.json", "other.json", "quality.json"):
        assert re.search(rf"passed over: \S*{name}", said)
        assert name in (tmp_path / "out" / "report.md").read_text()
    assert "newer.json" not in said


def test_measured_and_modelled_kernels_are_two_parts(made: dict[str, Path]) -> None:
    parts, passed_over = gather([made["kernels"], made["kernels-static"]])
    assert list(parts) == ["kernels", "kernels-static"] and passed_over == []


def test_files_of_one_name_are_kept_apart(made: dict[str, Path], tmp_path: Path) -> None:
    for key in ("sgrs", "vectors"):
        (tmp_path / key).mkdir()
        (tmp_path / key / "report.json").write_bytes(made[key].read_bytes())
    given = [str(tmp_path / key / "report.json") for key in ("sgrs", "vectors")]
    assert report.main([*given, "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["benchmark"] == "report"
    for key in ("sgrs", "vectors"):
        copied = tmp_path / "out" / f"{key}-report.json"
        assert copied.read_bytes() == made[key].read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "not the report of a benchmark"),
        ('{"benchmark": 1}', "not the report of a benchmark"),
        (small(1, benchmark="quality"), "'quality' has no place"),
        (small(1, date="soon"), "not as `headway bench profile-loading` writes it"),
        (small(1, date=None), "not as `headway bench profile-loading` writes it"),
        (small(1, environment=None), "no environment"),
        (small(1, comparisons=[{}]), "not as `headway bench profile-loading` writes it: no"),
        (
            small(1, benchmark="overhead"),
            "not as `headway bench overhead` writes it: no 'scenarios'",
        ),
        ('{"benchmark": "report", "parts": {}}', "a merged report"),
        ('{"benchmark": "report"}', "a report without parts"),
    ],
)
def test_a_named_file_that_is_none(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(text)
    output = tmp_path / "out"
    assert report.main([str(tmp_path / "x.json"), "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.json" in line and message in line and not output.exists()


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "no report of a benchmark" in capsys.readouterr().err
    assert report.main([str(tmp_path / "missing.json")]) == 2
    assert "missing.json: No such file" in capsys.readouterr().err
    with pytest.raises(PartError):
        gather([])


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(small(1))
    (tmp_path / "file").write_text("")
    assert report.main([str(tmp_path), "--output", str(tmp_path / "file" / "out")]) == 1
    assert "error" in capsys.readouterr().err


# Details


def test_text_is_escaped_on_both_pages() -> None:
    bad = "<script>alert(1)</script> | `a<b`"
    sections = [Section("s", [Text(bad, "warning"), Table(bad, (bad,), [[bad]], bad, bad)])]
    assert not {tag for tag, _ in Page(page(bad, "d", sections)).tags} & {"script", "b"}
    text = markdown(bad, "d", sections)
    assert "<script" not in text and "| &lt;script>alert(1)&lt;/script> &#124; `a&lt;b` |" in text


def test_an_interval_far_out_does_not_spread_the_axis(made: dict[str, Path]) -> None:
    row = findings(parts_of(made)["serve"])[0]
    wide = type(row)(row.name, row.metric, 0.9, 0.001, 50.0)
    words = re.findall(r">([^<>]+)</text>", forest("a", [row, wide], "label"))
    ticks = [float(each) for each in words if re.fullmatch(r"\d\.\d+", each)]
    assert len(ticks) > 2 and min(ticks) > 0.5 and max(ticks) < 1.5


def test_a_plot_has_its_source_on_both_pages() -> None:
    plot = Plot("Plot", "name", "<svg></svg>", "f.json, d")
    sections = [Section("s", [plot])]
    for text in (page("t", "d", sections), markdown("t", "d", sections)):
        assert "From f.json, d." in text
