"""`headway bench kernels --static`: what can be known of the kernels without running them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from headway.benchmarks.environment import environment
from headway.benchmarks.kernels import model
from headway.kernels import aot


def static_report(
    rows: Sequence[aot.Compiled], modelled: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The compiled variants and the modelled cases as JSON values, told apart by their keys."""
    return {
        "benchmark": "kernels",
        "measured": False,
        "compiled": [row.as_json() for row in rows],
        "modelled": {"assumptions": model.ASSUMPTIONS, "cases": list(modelled)},
        "environment": environment(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def static_table(rows: Sequence[aot.Compiled], modelled: Sequence[dict[str, Any]]) -> str:
    """Both for people."""
    return "\n".join(["COMPILED, not run", "", aot.table(rows), "", modelled_table(modelled)])


def modelled_table(cases: Sequence[dict[str, Any]]) -> str:
    """Modelled times, under a heading that says so."""
    names = [f"{case['kernel']}: {case['case']}" for case in cases]
    width = max(map(len, [*names, "kernel"]))
    lines = ["MODELLED, not measured", f"{model.ASSUMPTIONS}; roofline: 100 % and no launch", ""]
    lines.append(" " * (width + 20) + "".join(f"  {gpu.name:^31}" for gpu in model.GPUS).rstrip())
    columns = f"  {'roofline':>8} {'modelled':>8}  {'bound by':<12}"
    heading = f"{'kernel':<{width}} {'MB':>9} {'GFLOP':>9}" + columns * len(model.GPUS)
    lines.append(heading.rstrip())
    for name, case in zip(names, cases, strict=True):
        megabytes = (case["bytes_read"] + case["bytes_written"]) / 1e6
        line = f"{name:<{width}} {megabytes:>9.3f} {case['tensor_core_flops'] / 1e9:>9.3f}"
        for gpu in case["gpus"].values():
            roofline, modelled = gpu["roofline_seconds"] * 1e6, gpu["modelled_seconds"] * 1e6
            line += f"  {roofline:>8.2f} {modelled:>8.2f}  {gpu['bound_by']:<12}"
        lines.append(line.rstrip())
    return "\n".join([*lines, "", "roofline, modelled: microseconds a call"])
