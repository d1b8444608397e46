"""`headway bench`: runs one of the benchmarks under benchmarks/."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

BENCHMARKS = {
    "overhead": "tokens/s of an idle and of a steering Headway engine, relative to stock vLLM",
    "kernels": "the Triton kernels: timed on a CUDA device, or compiled and modelled without one",
}
"""Name -> one line of help; a benchmark is the module of its name in `headway.benchmarks`."""


def main(argv: Sequence[str]) -> int:
    """Run the named benchmark with the remaining options."""
    if argv and argv[0] in BENCHMARKS:
        benchmark = import_module(f"headway.benchmarks.{argv[0]}")
        code: int = benchmark.main(argv[1:])
        return code
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:<{width}}  {line}" for name, line in BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        prog="headway bench",
        usage="headway bench [-h] NAME ...",
        description="Measure the cost of steering on this machine.",
        epilog="\n".join(["benchmarks:", *lines, "", "headway bench NAME --help: its options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(BENCHMARKS), metavar="NAME", help=argparse.SUPPRESS)
    parser.parse_args(argv)
    return 0
