"""`headway bench kernels`: the Triton kernels one by one.

    headway bench kernels              # on a CUDA device: measured times
    headway bench kernels --static     # anywhere: compiled code, and modelled times

`<kernel>.py` here has a function `cases()` that yields the launches of `kernels/triton/<kernel>.py`
to time; `model.py` knows their bytes and flops.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.benchmarks.environment import (
    NO_MEASUREMENTS,
    cuda_device,
    environment,
    interpreter_refusal,
)
from headway.kernels import aot
from headway.kernels.occupancy import LIMITS

if TYPE_CHECKING:
    from headway.benchmarks.kernels.device import Case

NAME = "headway bench kernels"


def main(argv: Sequence[str]) -> int:
    """Report on the kernels: 0, 1 if one did not compile or run, 2 if nothing can be done here."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.static:
        return _static(args)
    if args.arch or args.match:
        parser.error("--arch and --match choose what --static compiles")
    if reason := refusal():
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    return _measure(args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Time the Triton kernels, or report what is known without a GPU."
    )
    parser.add_argument(
        "--static", action="store_true", help="compile ahead of time and model; needs no GPU"
    )
    aot.add_selection(parser)
    parser.add_argument("--repetitions", type=_repetitions, help="of each launch, when measuring")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")
    return parser


def refusal() -> str | None:
    """Why nothing can be measured here, or None."""
    reason = interpreter_refusal()
    if reason is None and cuda_device() is None:
        reason = f"no CUDA device; {NO_MEASUREMENTS}"
    return f"{reason}; use --static" if reason else None


def cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """The launches of these kernels, of all if none is named; tensors are made as they come.

    Raises aot.AotError for a name without cases.
    """
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        if hasattr(module, "cases"):
            found[info.name] = module.cases
    if unknown := sorted(set(names) - set(found)):
        raise aot.AotError(f"no cases for {', '.join(unknown)}; there are {', '.join(found)}")
    for name in names or found:
        yield from found[name]()


def _static(args: argparse.Namespace) -> int:
    from headway.benchmarks.kernels import model, static

    try:
        variants = list(aot.specialisations(args.kernel, args.match))
        rows = aot.compile_with_progress(variants, args.arch or tuple(LIMITS))
    except aot.AotError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    modelled = model.report(args.kernel)
    _write(args.json, static.static_report(rows, modelled))
    print(static.static_table(rows, modelled))
    return 1 if any(row.error for row in rows) else 0


def _measure(args: argparse.Namespace) -> int:
    from headway.benchmarks.kernels import device

    try:
        result = device.measure_all(cases(args.kernel), args.repetitions or device.REPETITIONS)
    except aot.AotError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report = {"benchmark": "kernels", "measured": True, **result}
    _write(args.json, report | {"environment": environment(), "date": date})
    print(device.table(result))
    return 1 if any("error" in row for row in result["cases"]) else 0


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n")


def _repetitions(value: str) -> int:
    repetitions = int(value)
    if repetitions < 2:
        raise argparse.ArgumentTypeError("at least 2, quartiles need them")
    return repetitions
