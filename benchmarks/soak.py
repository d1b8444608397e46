"""Minutes of mixed traffic on a real server, and limits that it must keep.

    headway bench soak --quick           # 60 seconds
    headway bench soak                   # 10 minutes

Steered, unsteered, bad, leaving, slow and identical requests and changes of the registry come at a
fixed concurrency from a seed (`soak_traffic.py`). The limits are in `soak_checks.py`; unsteered
answers are compared with those of stock vLLM, which is asked when the soak is over, so that it
takes nothing of the machine meanwhile. The exit code is 1 where a limit is broken. See README.md
here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from headway.benchmarks.engine import SERVER_SETTINGS, server_settings
from headway.benchmarks.environment import cuda_device, interpreter_refusal
from headway.benchmarks.options import chosen_model, new_parser, output_file, save
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.serve_servers import PROGRAMS, STOCK
from headway.benchmarks.soak_checks import Soak
from headway.benchmarks.soak_parity import TOLERANCE, compare_all
from headway.benchmarks.soak_report import broken, report, table
from headway.benchmarks.soak_session import Target, run_soak
from headway.benchmarks.soak_watch import listening_pid
from headway.server import launch
from headway.server.http.admin import KEY_OPTION, KEY_VARIABLE
from headway.server.launch import LaunchError, Program

NAME = "headway bench soak"
MINUTES, QUICK_MINUTES = 10.0, 1.0
CONCURRENCY = 16
MAX_MODEL_LEN = 1024
NUM_BLOCKS = 24
"""Blocks of the KV cache, 128 tokens each on CPU. So few that all are in use within seconds, which
memory that grows later is told from, and that requests are preempted now and then."""


def main(argv: Sequence[str]) -> int:
    """Soak, print a table and write the JSON: 1 where a limit is broken, or for an error.

    2 where nothing may be measured.
    """
    args = build_parser().parse_args(argv)
    if reason := interpreter_refusal():
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES)
    try:
        output = output_file("soak", args.output)
        bench = Bench(
            chosen_model(args.model), args.dtype, 60 * minutes, args.concurrency, args.seed
        )
        result = bench.run(output, args)
    except (EndpointError, LaunchError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    save(result, table(result), output)
    found = broken(result)
    if found:
        print(f"{NAME}: broken: {'; '.join(found)}", file=sys.stderr)
    return 1 if found else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = new_parser(
        NAME,
        "Mixed traffic for minutes, and limits that the server must keep.",
        seed="all requests",
        quick="60 seconds",
        dtype="float32",  # in which answers can be compared most closely
    )
    parser.add_argument("--minutes", type=float, help=f"{MINUTES:g} by default")
    parser.add_argument(
        "--concurrency", type=int, default=CONCURRENCY, help="requests at a time, %(default)s"
    )
    parser.add_argument("--url", help="a server that is up already, of the same model")
    parser.add_argument(
        KEY_OPTION,
        metavar="KEY",
        default=os.environ.get(KEY_VARIABLE, "").split(",")[0],
        help=f"with --url: its admin key, that of {KEY_VARIABLE} by default",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY", ""),
        help="with --url: vLLM's API key, that of VLLM_API_KEY by default",
    )
    parser.add_argument(
        "--without-stock", action="store_true", help="compare no answers with stock vLLM"
    )
    return parser


@dataclass(frozen=True)
class Bench:
    """What is to be soaked, and for how long: `seconds`."""

    model: Path
    dtype: str
    seconds: float
    concurrency: int
    seed: int

    def run(self, output: Path, args: argparse.Namespace) -> dict[str, Any]:
        """The report; logs of the servers go beside `output`.

        Raises EndpointError, LaunchError, OSError, ValueError, httpx.HTTPError.
        """
        warnings: list[str] = []
        soak = None
        with tempfile.TemporaryDirectory(prefix="headway-bench-") as name:
            folder = Path(name)
            try:
                with self.target(folder, output.with_suffix(".log"), args) as target:
                    soaking = run_soak(
                        target, self.dtype, self.seconds, self.concurrency, self.seed
                    )
                    soak = asyncio.run(soaking)
            except LaunchError as error:
                if soak is None:
                    raise LaunchError(f"{error}; see {output.with_suffix('.log')}") from None
                soak.ended_badly = str(error)  # which takes nothing from what was seen
            if not args.without_stock:
                try:
                    self.compare(soak, folder, output.with_name(f"{output.stem}-stock.log"))
                except (EndpointError, LaunchError, httpx.HTTPError) as error:
                    warnings.append(f"stock vLLM: {error}")
        facts: dict[str, Any] = {
            "model": self.model.name,
            "dtype": self.dtype,
            "seed": self.seed,
            "concurrency": self.concurrency,
            "attached": args.url is not None,
        }
        if not args.url:
            facts["server_settings"] = server_settings()
        return report(soak, facts, warnings)

    @contextmanager
    def target(self, folder: Path, log: Path, args: argparse.Namespace) -> Iterator[Target]:
        """The server that was named, or one of our own. Raises LaunchError, ValueError."""
        if args.url:
            if not args.steering_api_key:
                raise ValueError(f"--url needs {KEY_OPTION} as well: the registry is part of it")
            url = args.url.rstrip("/").removesuffix("/v1")
            pid = listening_pid(urlsplit(url).port or 80)
            yield Target(url, pid, args.steering_api_key, args.api_key)
            return
        key = secrets.token_hex(16)
        own = {KEY_VARIABLE: key, "HEADWAY_HOME": str(folder / "home"), "VLLM_API_KEY": ""}
        program = Program(launch.HEADWAY.command, launch.HEADWAY.ready, own)
        print("starting headway serve, usually in less than a minute", file=sys.stderr)
        with launch.running(
            program, self.model, self.flags(), folder, log, SERVER_SETTINGS
        ) as running:
            yield Target(running.url, running.pid, key)

    def compare(self, soak: Soak, folder: Path, log: Path) -> None:
        """Ask stock vLLM for the sampled answers; sets `parity`.

        Raises EndpointError, LaunchError, httpx.HTTPError.
        """
        stock = PROGRAMS[STOCK]
        with launch.running(
            stock, self.model, self.flags(), folder, log, SERVER_SETTINGS
        ) as running:
            print(f"asking stock vLLM for {len(soak.samples)} answers", file=sys.stderr)
            tolerance = TOLERANCE[self.dtype]
            asking = compare_all(running.url, str(self.model), soak.samples, tolerance)
            soak.parity = asyncio.run(asking)

    def flags(self) -> list[str]:
        """vLLM's options, the same for both servers."""
        flags = ["--dtype", self.dtype, "--max-model-len", str(MAX_MODEL_LEN), "--seed", "0"]
        flags += ["--max-num-seqs", str(self.concurrency), "--enable-prefix-caching"]
        if cuda_device() is not None:
            return flags
        return [*flags, "--enforce-eager", "--num-gpu-blocks-override", str(NUM_BLOCKS)]
