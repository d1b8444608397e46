"""`headway bench`: runs one of the benchmarks under benchmarks/."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

BENCHMARKS = {
    "overhead": "tokens/s of an idle and of a steering Headway engine, relative to stock vLLM",
    "kernels": "the Triton kernels: timed on a CUDA device, or compiled and modelled without one",
    "quality": "what steering does to answers: hallucinated objects (POPE, CHAIR), perplexity",
    "head-selection": "time to first token and tokens/s where VHR chooses heads by the prompt",
    "sgrs": "time per output token with SGRS: to unsteered requests, and to SGRS as published",
    "serve": "latencies, tokens/s and memory of a steering server over HTTP, and of stock vLLM",
    "profile-loading": "how long a new vector profile loads, and whom that stalls",
    "peers": "tokens/s of the same steering on transformers and other libraries, side by side",
    "vectors": "what a vector profile does to answers: language of code, form, perplexity",
    "soak": "minutes of mixed traffic on a server, and limits on errors, leaks and memory",
    "report": "one report of what the benchmarks found: tables and plots, as a page and Markdown",
    "compare": "what changed between two such reports, or two of one benchmark",
}
"""Name -> one line of help."""


def module_of(name: str) -> str:
    """The module in `headway.benchmarks` that a benchmark is."""
    return name.replace("-", "_")


def main(argv: Sequence[str]) -> int:
    """Run the named benchmark with the remaining options."""
    if argv and argv[0] in BENCHMARKS:
        benchmark = import_module(f"headway.benchmarks.{module_of(argv[0])}")
        code: int = benchmark.main(argv[1:])
        return code
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:<{width}}  {line}" for name, line in BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        prog="headway bench",
        usage="headway bench [-h] NAME ...",
        description="Measure what steering costs on this machine, and what it does to answers.",
        epilog="\n".join(["benchmarks:", *lines, "", "headway bench NAME --help: its options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(BENCHMARKS), metavar="NAME", help=argparse.SUPPRESS)
    parser.parse_args(argv)
    return 0
