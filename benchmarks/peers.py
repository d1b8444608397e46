"""The same steering served by Headway and by its alternatives, side by side in one run.

    headway bench peers --quick

Headway is one `headway serve`, asked over HTTP; each peer is a process in an environment of its
own, which is made from the package registry. All are up at the same time and one works. A peer
that cannot run is listed with the reason and the command that was tried. See README.md here.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headway.benchmarks.engine import EngineError
from headway.benchmarks.environment import (
    busy_seconds,
    cuda_device,
    interpreter_refusal,
    own_seconds,
)
from headway.benchmarks.options import chosen_model, new_parser, output_file, save
from headway.benchmarks.peer_systems import (
    published_sgrs,
    repeng,
    saklas,
    steering_vectors,
    transformers_hooks,
    vllm_lens,
)
from headway.benchmarks.peer_systems.choice import available, selected
from headway.benchmarks.peer_systems.headway_server import (
    NAME as HEADWAY,
)
from headway.benchmarks.peer_systems.headway_server import (
    HeadwayServer,
    headway,
    read_geometry,
)
from headway.benchmarks.peer_systems.loads import METHODS, Sizes, steering
from headway.benchmarks.peer_systems.properties import (
    NOT_APPLICABLE,
    PROPERTIES,
    TRIED,
    Trial,
    request,
)
from headway.benchmarks.peer_systems.protocol import Answer, Peer, Request
from headway.benchmarks.peer_systems.published_sgrs import PublishedSGRS
from headway.benchmarks.peer_systems.report import Key, Measurement, report, table
from headway.benchmarks.peer_systems.worker_process import PeerError, Refused, WorkerProcess
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.sgrs_load import BATCH, prompts
from headway.server.launch import LaunchError

NAME = "headway bench peers"
ROUNDS, QUICK_ROUNDS = 7, 2
PROMPT_TOKENS, LONG_PROMPT_TOKENS, OUTPUT_TOKENS = 128, 300, 32
PEERS = (
    transformers_hooks.PEER,
    steering_vectors.PEER,
    repeng.PEER,
    vllm_lens.PEER,
    saklas.PEER,
    published_sgrs.PEER,
)
"""In the order of the table. Another one is a file in `peer_systems/` and a row here."""
HEADWAY_NOTES = "over HTTP; every request has a configuration of its own"
PEER_ERRORS = (PeerError, Refused, EngineError)
"""What a peer that runs may raise; the run goes on without it."""


@dataclass(frozen=True)
class Contender:
    """A peer that runs."""

    peer: Peer
    system: WorkerProcess | PublishedSGRS


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON: 0, 1 for an error, 2 where nothing is measured."""
    args = build_parser().parse_args(argv)
    reason = interpreter_refusal()
    if reason is None and cuda_device() is not None:
        reason = "peers are driven on CPU only"
    if reason:
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    try:
        chosen = selected(PEERS, args.only)
        output = output_file("peers", args.output)
        model = chosen_model(args.model)
        measurement = Measurement()
        ready = available(chosen, measurement)
        rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
        log = output.with_suffix(".log").absolute()
        bench = Bench(model, args.dtype, args.concurrency, args.seed)
        bench.run(ready, measurement, rounds, log)
    except (EndpointError, LaunchError, PeerError, OSError, ValueError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 1
    result = report(measurement, PEERS, model.name, args.dtype, args.concurrency, rounds)
    save(result, table(result), output)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    parser = new_parser(
        NAME,
        "Measure the same steering on Headway and on its alternatives.",
        rounds=ROUNDS,
        seed="prompts and order",
        quick=f"{QUICK_ROUNDS} rounds, not {ROUNDS}",
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help='what has this in its name, such as "repeng, caa"',
    )
    parser.add_argument(
        "--concurrency", type=_concurrency, default=BATCH, help="requests, %(default)s by default"
    )
    return parser


class Bench:
    """What all systems are asked in one run."""

    def __init__(self, model: Path, dtype: str, concurrency: int, seed: int) -> None:
        self.model, self.dtype, self.concurrency, self.seed = model, dtype, concurrency, seed
        geometry = read_geometry(model)
        self.sizes = Sizes(geometry.num_layers, geometry.num_heads, geometry.hidden_size)
        drawn = prompts(model, PROMPT_TOKENS, seed)
        # A batch of the properties has `TRIED` requests, however many are timed.
        number = max(concurrency, TRIED)
        self.tried_prompts = [drawn[index % len(drawn)] for index in range(number)]
        self.prompts = self.tried_prompts[:concurrency]
        self.long_prompt = prompts(model, LONG_PROMPT_TOKENS, seed)[0]

    def requests(self, method: str, shared: bool = False) -> list[Request]:
        """A batch; shared: all requests are steered as the first is."""
        return [
            request(tokens, steering(method, self.sizes, 0 if shared else index))
            for index, tokens in enumerate(self.prompts)
        ]

    def trial(self, system: Any, method: str, peer: Peer | None = None) -> Trial:
        """The properties of a method on a running system; peer: None for Headway."""
        steered = [steering(method, self.sizes, index) for index in range(TRIED)]
        shared, checked = (peer.shared, peer.checked) if peer else (False, True)
        return Trial(system, self.tried_prompts, self.long_prompt, steered, shared, checked)

    def run(
        self,
        ready: Sequence[tuple[Peer, tuple[str, ...], Path]],
        measurement: Measurement,
        rounds: int,
        log: Path,
    ) -> None:
        """Start everything, try the properties and measure `rounds` times. Raises as `main` has."""
        needed = [each for each in METHODS if any(each in methods for _, methods, _ in ready)]
        if not needed:
            return  # nothing to compare with
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headway-bench-")))
            print("starting headway serve, usually in less than a minute", file=sys.stderr)
            longest = LONG_PROMPT_TOKENS + OUTPUT_TOKENS
            size = max(self.concurrency, TRIED)
            server = stack.enter_context(
                headway(self.model, self.dtype, size, longest, folder, log)
            )
            for method in tqdm(needed, desc="trying Headway", unit="method", leave=False):
                self._try_headway(server, method, measurement)
            running: dict[Key, Contender] = {}
            for peer, methods, python in tqdm(ready, desc="trying peers", leave=False):
                try:
                    started = Contender(peer, self._start(peer, python, folder, stack))
                    for method in methods:
                        self._try_peer(started, server, method, measurement)
                except PEER_ERRORS as error:
                    measurement.lost(peer, methods, str(error), command_of(peer))
                    continue
                running |= {(peer.name, method): started for method in methods}
            self._measure(server, running, measurement, rounds)

    def _start(
        self, peer: Peer, python: Path, folder: Path, stack: ExitStack
    ) -> WorkerProcess | PublishedSGRS:
        if peer is published_sgrs.PEER:
            published = PublishedSGRS(self.model, self.dtype)
            stack.callback(published.close)
            return published
        log = folder / f"{peer.module}.log"
        worker = WorkerProcess(peer, python, self.model, self.dtype, log)
        stack.callback(worker.close)
        return worker

    def _try_headway(self, server: HeadwayServer, method: str, measurement: Measurement) -> None:
        key = HEADWAY, method
        trial = self.trial(server, method)
        measurement.properties[key] = trial.results()
        measurement.notes[key] = "; ".join([HEADWAY_NOTES, *trial.reasons])
        measurement.speeds[key] = []

    def _try_peer(
        self, started: Contender, server: HeadwayServer, method: str, measurement: Measurement
    ) -> None:
        peer, system = started.peer, started.system
        key = peer.name, method
        measurement.speeds[key] = []
        if isinstance(system, PublishedSGRS):
            measurement.properties[key] = dict.fromkeys(PROPERTIES, NOT_APPLICABLE)
            measurement.notes[key] = peer.notes
            return
        trial = self.trial(system, method, peer)
        measurement.properties[key] = trial.results()
        asked = self.requests(method, peer.shared)
        theirs = system.answer(asked, OUTPUT_TOKENS)
        same = agreeing(theirs, server.answer(asked, OUTPUT_TOKENS))
        note = f"{same} of {len(asked)} steered answers equal Headway's"
        measurement.notes[key] = "; ".join([peer.notes, note, *trial.reasons])

    def _measure(
        self,
        server: HeadwayServer,
        running: Mapping[Key, Contender],
        measurement: Measurement,
        rounds: int,
    ) -> None:
        order = random.Random(self.seed)
        left = dict(running)
        methods = list(dict.fromkeys(method for _, method in running))
        tokens = self.concurrency * OUTPUT_TOKENS
        began, own, busy = time.perf_counter(), own_seconds(), busy_seconds()
        for index in tqdm(range(rounds), desc="measuring", unit="round", leave=False):
            for method in order.sample(methods, len(methods)):
                asked, salt = self.requests(method), f"round {index} {method}"
                started = time.perf_counter()
                answers = server.answer(asked, OUTPUT_TOKENS, salt=salt)
                seconds = time.perf_counter() - started
                measurement.speeds[HEADWAY, method].append(tokens / seconds)
                keys = [key for key in left if key[1] == method]
                for key in order.sample(keys, len(keys)):
                    peer = left[key].peer
                    try:
                        speed = self._speed(left[key], method, answers)
                    except PEER_ERRORS as error:
                        gone = [each for each in left if each[0] == peer.name]
                        names = [each for _, each in gone]
                        measurement.lost(peer, names, str(error), command_of(peer))
                        for each in gone:
                            del left[each]
                        continue
                    measurement.speeds[key].append(speed)
        foreign = busy_seconds() - busy - (own_seconds() - own)
        measurement.foreign_share = max(0.0, foreign) / (time.perf_counter() - began)

    def _speed(self, started: Contender, method: str, answers: Sequence[Answer]) -> float:
        """Output tokens per second of a batch; answers: Headway's to the same requests."""
        peer, system = started.peer, started.system
        if isinstance(system, PublishedSGRS):
            return 1 / system.seconds_per_token(self.prompts[0], answers)
        system.answer(self.requests(method, peer.shared), OUTPUT_TOKENS)
        return self.concurrency * OUTPUT_TOKENS / system.seconds


def command_of(peer: Peer) -> str:
    """What was tried of a peer that was started."""
    return f"the worker {peer.module}.{peer.system} in its environment"


def agreeing(some: Sequence[Answer], others: Sequence[Answer]) -> int:
    """How many answers have the same tokens."""
    pairs = zip(some, others, strict=True)
    return sum(one["token_ids"] == other["token_ids"] for one, other in pairs)


def _concurrency(value: str) -> int:
    found = int(value)
    if found < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return found
