"""The kernels in `headway bench report`: what was measured and what is modelled, strictly apart."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from headway.benchmarks.report_blocks import Block, Plot, Table, Text
from headway.benchmarks.report_parts import Part
from headway.benchmarks.report_plots import modelled as modelled_plot

MODELLED_NOTE = (
    "No time here was measured: all follow from counted bytes and flops and from data sheets."
)


def measured(part: Part) -> list[Block]:
    """Times of launches on a CUDA device."""
    result = part.result
    rows = []
    for row in result["cases"]:
        name = f"{row['kernel']}: {row['case']}"
        if "error" in row:
            rows.append((name, f"error: {row['error']}", "", "", ""))
            continue
        seconds = row["seconds"]
        rows.append(
            (
                name,
                f"{seconds['median'] * 1e6:.2f}",
                f"{seconds['low'] * 1e6:.2f} .. {seconds['high'] * 1e6:.2f}",
                f"{row['bytes_per_second'] / 1e9:,.0f}",
                f"{row['tensor_core_flops_per_second'] / 1e12:.1f}",
            )
        )
    floor = result["floor_seconds"]["median"] * 1e6
    note = (
        f"On {result['device']}: replay of a CUDA graph, cold L2, {result['repetitions']} "
        f"repetitions; a graph that fills one number takes {floor:.2f} us. Bytes and flops are "
        "those of the model."
    )
    columns = ("kernel", "us, median", "quartiles", "GB/s", "TFLOP/s")
    return [Table("Measured times", columns, rows, part.source, note)]


def compiled(part: Part) -> list[Block]:
    """Properties of the code, over the variants of each kernel for each architecture."""
    rows: list[tuple[str, ...]] = []
    blocks: list[Block] = []
    every = sorted(part.result["compiled"], key=lambda row: (row["kernel"], row["arch"]))
    for (kernel, arch), group in groupby(every, lambda row: (row["kernel"], row["arch"])):
        variants = list(group)
        made = [row for row in variants if not row["error"]]
        for row in variants:
            if row["error"]:
                text = f"{kernel}, {row['name']}, sm_{arch} did not compile: {row['error']}"
                blocks.append(Text(text, "warning"))
        rows.append(
            (
                kernel,
                f"sm_{arch}",
                str(len(variants)),
                str(len(variants) - len(made)),
                str(sum(row["spills"] > 0 for row in made)),
                _most(row["registers"] for row in made),
                _most(row["shared"] for row in made),
                _least(row["warps_per_sm"] for row in made),
            )
        )
    columns = ["kernel", "architecture", "variants", "failed", "with spills", "registers, most"]
    columns += ["shared memory, most bytes", "warps on a multiprocessor, fewest"]
    title = "Compiled code: its properties, nothing was run"
    return [Table(title, columns, rows, part.source), *blocks]


def modelled(part: Part) -> list[Block]:
    """Times that the data sheets of two GPUs allow, and under the assumptions that are named."""
    cases = part.result["modelled"]["cases"]
    note = f"{MODELLED_NOTE} Assumptions: {part.result['modelled']['assumptions']}."
    if not cases:
        return [Text(note)]
    gpus = list(cases[0]["gpus"])
    rows = []
    plotted: dict[str, list[tuple[str, float, float]]] = {gpu: [] for gpu in gpus}
    for case in cases:
        name = f"{case['kernel']}: {case['case']}"
        megabytes = (case["bytes_read"] + case["bytes_written"]) / 1e6
        row = [name, f"{megabytes:.3f}", f"{case['tensor_core_flops'] / 1e9:.3f}"]
        for gpu in gpus:
            found = case["gpus"][gpu]
            seconds = found["roofline_seconds"], found["modelled_seconds"]
            row += [*(f"{each * 1e6:.2f}" for each in seconds), found["bound_by"]]
            plotted[gpu].append((name, *seconds))
        rows.append(row)
    columns = ["kernel", "MB, counted", "GFLOP, counted"]
    for gpu in gpus:
        columns += [f"{gpu}: roofline, us, modelled", f"{gpu}: us, modelled"]
        columns += [f"{gpu}: bound by, modelled"]
    name = "kernels-modelled"
    svg = modelled_plot(name, plotted)
    return [
        Plot("Modelled times of the kernels", name, svg, part.source, note),
        Table("Modelled times of the kernels, not measured", columns, rows, part.source, note),
    ]


def _most(values: Iterable[int]) -> str:
    return str(max(values, default=""))


def _least(values: Iterable[int]) -> str:
    return str(min(values, default=""))
