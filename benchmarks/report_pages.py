"""A report as one HTML page, and as Markdown with its plots as files."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from headway.benchmarks.report_blocks import Block, Plot, Section, Table, Text, Word
from headway.benchmarks.report_plots import as_file

TEMPLATE = Path(__file__).with_name("report.html.j2")


def page(title: str, date: str, sections: Sequence[Section]) -> str:
    """HTML that needs nothing but itself: styles and plots are inline, and it has no scripts."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": _code, "is_number": _is_number}
    environment.tests |= {
        name: lambda block, kind=kind: isinstance(block, kind)
        for name, kind in (("table", Table), ("plot", Plot), ("verdict", Word))
    }
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(title=title, date=date, sections=sections)


def markdown(title: str, date: str, sections: Sequence[Section]) -> str:
    """The same in Markdown, which shows the plots of `plot_files`."""
    lines = [f"# {_cell(title)}", "", f"Written {date}."]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", *_lines(block)]
    return "\n".join(lines) + "\n"


def plot_files(sections: Sequence[Section]) -> Mapping[str, str]:
    """Name of a file -> SVG, of all plots."""
    plots = (block for section in sections for block in section.blocks if isinstance(block, Plot))
    return {f"{plot.name}.svg": as_file(plot.svg) for plot in plots}


def _lines(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        text = _cell(block.text)
        yield {"heading": f"### {text}", "warning": f"> **Warning:** {text}"}.get(block.kind, text)
        return
    yield f"#### {_cell(block.title)}"
    yield ""
    if isinstance(block, Plot):
        yield f"![{_cell(block.title)}]({block.name}.svg)"
    elif not block.rows:
        yield "Nothing."
    else:
        yield _row(block.columns)
        yield _row(["---"] * len(block.columns))
        for row in block.rows:
            yield _row([f"**{_cell(each)}**" if _is_verdict(each) else each for each in row])
    yield ""
    source = f"From {_cell(block.source)}." if block.source else ""
    yield " ".join(filter(None, [_cell(block.note), source]))


def _is_verdict(cell: str) -> bool:
    return isinstance(cell, Word)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that neither ends a cell nor is read as HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "&#124;")


def _code(text: str) -> Markup:
    """Escaped, what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))


def _is_number(cell: str) -> bool:
    return bool(re.match(r"[-+]?\d[\d.,]*( |%|$)", cell))
