"""What steering costs a user over HTTP: latencies, tokens/s and memory, by vLLM's own client.

    headway bench serve --quick

Stock vLLM and Headway serve the same model at the same time; in every round each cell of the matrix
is asked for once, while all other servers wait: cells that are compared close together, else in
random order. Ratios are taken within rounds, so that what slows the machine for longer slows both
sides. What a run of a cell sends, and which times come from prompts that are in the prefix cache,
is told in `serve_load.py`; the cells are in `serve_matrix.py`. See README.md here.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tqdm import tqdm

from headway.benchmarks.environment import (
    busy_seconds,
    cuda_device,
    interpreter_refusal,
    own_seconds,
)
from headway.benchmarks.options import chosen_model, new_parser, output_file, save
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.rounds import compared_together, shuffled
from headway.benchmarks.serve_load import Load, Run, pictures, texts
from headway.benchmarks.serve_matrix import (
    CPU_ONLY,
    HEADWAY,
    POINTS,
    QUICK_POINTS,
    STEERING,
    STREAMS,
    TEXT,
    Cell,
    Comparison,
    cells,
    comparisons,
    drawn_profile,
    profile_name,
)
from headway.benchmarks.serve_report import report, table
from headway.benchmarks.serve_servers import Order, Server, serving
from headway.server.commands.model import PROFILE_OPTION, quiet_stdout
from headway.server.launch import LaunchError
from headway.steering import ModelGeometry

NAME = "headway bench serve"
ROUNDS, QUICK_ROUNDS = 6, 3
OUTPUT_TOKENS, QUICK_OUTPUT_TOKENS = 32, 16
DEVICE_MEMORY = 0.9
"""Share of a CUDA device's memory for all servers together."""


@dataclass
class Measurement:
    """The runs of every cell, round by round, and MiB of each server by its name."""

    runs: dict[Cell, list[Run]] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON: 0 whatever the verdicts, 1 for an error.

    2 where nothing may be measured.
    """
    args = build_parser().parse_args(argv)
    if reason := interpreter_refusal():
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    output_tokens = QUICK_OUTPUT_TOKENS if args.quick else OUTPUT_TOKENS
    output = output_file("serve", args.output)
    on_cuda = cuda_device() is not None
    try:
        left_out = CPU_ONLY if on_cuda else frozenset()
        compared = comparisons(QUICK_POINTS if args.quick else POINTS, args.only, left_out)
        model = chosen_model(args.model)
        plan = Plan(compared, model, args.dtype, output_tokens, args.seed, on_cuda)
        measurement = plan.run(output, rounds)
    except (EndpointError, LaunchError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    facts = {"model": model.name, "dtype": args.dtype, "seed": args.seed, "rounds": rounds}
    facts |= {"output_tokens": output_tokens}
    result = report(compared, measurement.runs, measurement.memory, facts, on_cuda)
    save(result, table(result), output)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = new_parser(
        NAME,
        "Measure what steering costs a user over HTTP.",
        rounds=ROUNDS,
        seed="prompts and order",
        quick=f"a few cells, {QUICK_ROUNDS} rounds, {QUICK_OUTPUT_TOKENS} tokens, no pictures",
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="the comparisons with this in their name, such as locore"
    )
    return parser


@dataclass(frozen=True)
class Plan:
    """What is to be measured. model: the one that is asked for text."""

    compared: Sequence[Comparison]
    model: Path
    dtype: str
    output_tokens: int
    seed: int
    on_cuda: bool = False

    def run(self, output: Path, rounds: int) -> Measurement:
        """Start the servers, whose logs go beside `output`, and measure.

        Raises EndpointError, LaunchError, OSError or ValueError.
        """
        chosen = cells(self.compared)
        measurement = None
        with tempfile.TemporaryDirectory(prefix="headway-bench-") as name:
            folder = Path(name)
            models: dict[str, Path] = {
                modality: self.model if modality == TEXT else demo_vlm(self.dtype)
                for modality in dict.fromkeys(cell.modality for cell in chosen)
            }
            geometries = {modality: geometry_of(model) for modality, model in models.items()}
            profiles = profile_flags(geometries[TEXT], folder) if TEXT in models else []
            orders = {}
            for cell in chosen:
                log = output.with_name(f"{output.stem}-{cell.server}-{cell.modality}.log")
                flags = profiles if (cell.server, cell.modality) == (HEADWAY, TEXT) else []
                order = Order(cell.server, models[cell.modality], log, flags)
                orders[server_name(cell)] = order
            print(f"starting {len(orders)} servers, a minute or two", file=sys.stderr)
            try:
                with serving(orders, self.flags(chosen, len(orders)), folder, self.on_cuda) as up:
                    loads = self.loads(chosen, up, geometries)
                    measurement = measure(loads, self.compared, up, rounds, self.seed)
            except LaunchError as error:
                if measurement is None:
                    raise LaunchError(f"{error}; see {output.stem}-*.log") from None
                # A server that does not end well takes nothing from what was measured before.
                print(f"{NAME}: warning: {error}", file=sys.stderr)
        return measurement

    def flags(self, chosen: Sequence[Cell], num_servers: int) -> list[str]:
        """vLLM's options, the same for all servers."""
        longest = max(cell.prompt_tokens for cell in chosen) + self.output_tokens
        flags = ["--dtype", self.dtype, "--enable-prefix-caching", "--seed", "0"]
        flags += ["--max-model-len", str(longest), "--max-num-seqs", str(STREAMS)]
        if self.on_cuda:
            return [*flags, "--gpu-memory-utilization", f"{DEVICE_MEMORY / num_servers:.3f}"]
        return [*flags, "--enforce-eager"]

    def loads(
        self,
        chosen: Sequence[Cell],
        servers: Mapping[str, Server],
        geometries: Mapping[str, ModelGeometry],
    ) -> list[Load]:
        """The requests of every cell."""
        seen = pictures(self.seed)  # of all cells, since a picture is new only once
        loads = []
        for cell in chosen:
            specs = [
                STEERING[cell.arm, cell.modality](geometries[cell.modality], index)
                for index in range(cell.configurations)
            ]
            prompts = seen
            if cell.modality == TEXT:
                prompts = texts(self.model, cell.prompt_tokens, self.seed)
            server = servers[server_name(cell)]
            loads.append(Load(cell, server, specs, prompts, self.output_tokens))
        return loads


def measure(
    loads: Sequence[Load],
    compared: Sequence[Comparison],
    servers: Mapping[str, Server],
    rounds: int,
    seed: int,
) -> Measurement:
    """Run every load once to warm it up, and then `rounds` times, in another order each time, those
    that are compared close together.

    Raises EndpointError.
    """
    for load in tqdm(loads, desc="warming up", unit="cell", leave=False):
        load.run()
    by_cell = {load.cell: load for load in loads}
    measurement = Measurement({cell: [] for cell in by_cell})
    groups = compared_together(list(by_cell), [(each.cell, each.reference) for each in compared])
    order = random.Random(seed)
    for _ in tqdm(range(rounds), desc="measuring", unit="round", leave=False):
        for cell in shuffled(groups, order):
            measurement.runs[cell].append(watched(by_cell[cell], servers.values()))
            for server in servers.values():
                server.rss_mib()  # for the peak
    for name, server in servers.items():
        rss = server.rss_mib()
        measurement.memory[name] = {"rss_mib": rss, "peak_mib": server.peak_mib}
    return measurement


def watched(load: Load, servers: Iterable[Server]) -> Run:
    """A run of a load, and what CPU time others and the other servers used meanwhile."""
    waiting = [server for server in servers if server is not load.server]
    started, own, busy = time.perf_counter(), own_seconds(), busy_seconds()
    idle = sum(server.cpu_seconds() for server in waiting)
    run = load.run()
    idle = sum(server.cpu_seconds() for server in waiting) - idle
    busy, own = busy_seconds() - busy, own_seconds() - own
    seconds = time.perf_counter() - started
    run.foreign_share = max(0.0, busy - own) / seconds
    run.idle_share = idle / seconds
    return run


def server_name(cell: Cell) -> str:
    """What the report calls the server of a cell."""
    return cell.server if cell.modality == TEXT else f"{cell.server}, {cell.modality}"


def geometry_of(model: Path) -> ModelGeometry:
    """The sizes of a model. Raises ValueError if it cannot be steered."""
    from headway.server.commands.model import read_model, steerable_geometry

    with quiet_stdout():
        return steerable_geometry(read_model(str(model)))


def demo_vlm(dtype: str) -> Path:
    """The model that is asked about pictures. Raises ValueError or FileNotFoundError."""
    from headway.server.models.demo_vlm import ensure_demo_vlm

    return ensure_demo_vlm(dtype)


def profile_flags(geometry: ModelGeometry, folder: Path) -> list[str]:
    """Options that give a server a drawn profile for every configuration, written to a folder."""
    flags = []
    for index in range(STREAMS):
        path = folder / f"{profile_name(index)}.safetensors"
        drawn_profile(geometry, index).save(path)
        flags += [PROFILE_OPTION, f"{profile_name(index)}={path}"]
    return flags
