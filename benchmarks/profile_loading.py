"""What a new vector profile costs a server that is at work: how long it loads, and whom it stalls.

    headway bench profile-loading

One `headway serve` streams an unsteered request without end. In each round a profile that it has
never seen, of 4 directions in every layer, is put over HTTP and used twice: the first use has the
workers load its vectors, the second finds them there. Both ask for one token. How much later the
first use has it is the time of loading, and how much longer the stream beside it pauses, in units
of its own steps, is the stall. See README.md here.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from headway.benchmarks.engine import SERVER_SETTINGS, server_settings
from headway.benchmarks.environment import environment, interpreter_refusal
from headway.benchmarks.options import chosen_model, new_parser, output_file, save
from headway.benchmarks.quality.client import TIMEOUT_SECONDS, EndpointError, UnsteeredAnswer
from headway.benchmarks.serve_matrix import drawn_profile
from headway.benchmarks.statistics import Verdict, bootstrap_median, verdict
from headway.server import launch
from headway.server.commands.model import quiet_stdout, read_model, steerable_geometry
from headway.server.commands.remote import RemoteError, Server
from headway.server.http.admin import KEY_VARIABLE
from headway.server.launch import LaunchError, Program
from headway.steering import ModelGeometry
from headway.steering.vectors import VectorProfile

NAME = "headway bench profile-loading"
ROUNDS = 20
PROMPT = "The lighthouse keeper climbed the stairs and"
STREAM_TOKENS = 1800
PROFILE_NAME = "bench-loading"
LOAD_BAR, STALL_BAR = 0.2, 1.0
"""Seconds, and steps: the most that loading may take, by its median, and ever hold up others."""


@dataclass(frozen=True)
class Use:
    """One request with the profile: seconds to its token, the longest pause of the stream beside
    it, and the stream's median pause until then, which is a step.
    """

    seconds: float
    pause: float
    step: float


@dataclass
class Measurement:
    """By round: seconds of the upload, and both uses."""

    uploads: list[float] = field(default_factory=list)
    first: list[Use] = field(default_factory=list)
    second: list[Use] = field(default_factory=list)

    def loading(self) -> list[float]:
        """Seconds that the first use was later than the second."""
        return [a.seconds - b.seconds for a, b in zip(self.first, self.second, strict=True)]

    def stalls(self) -> list[float]:
        """Steps that the stream paused longer beside the first use than beside the second."""
        pairs = zip(self.first, self.second, strict=True)
        return [(a.pause - b.pause) / b.step for a, b in pairs]


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON: 0 whatever the verdicts, 1 for an error.

    2 where nothing may be measured.
    """
    args = build_parser().parse_args(argv)
    if reason := interpreter_refusal():
        print(f"{NAME}: error: {reason}", file=sys.stderr)
        return 2
    output = output_file("profile-loading", args.output)
    log = output.with_suffix(".log")
    key = secrets.token_hex(16)
    rounds = args.rounds or ROUNDS
    flags = ["--dtype", args.dtype, "--enforce-eager", "--max-num-seqs", "4"]
    flags += ["--max-model-len", "2048"]
    try:
        model = chosen_model(args.model)
        with quiet_stdout():
            geometry = steerable_geometry(read_model(str(model)))
        with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder:
            program = isolated(launch.HEADWAY, folder, key)
            print("starting headway serve, usually in less than a minute", file=sys.stderr)
            with launch.running(
                program, model, flags, Path(folder), log, SERVER_SETTINGS
            ) as server:
                run = measure(server.url, str(model), geometry, key, rounds, args.seed)
                measurement = asyncio.run(run)
    except (EndpointError, LaunchError, OSError, RemoteError, ValueError) as error:
        print(f"{NAME}: error: {error}; see {log}", file=sys.stderr)
        return 1
    result = report(measurement)
    result |= {"model": model.name, "dtype": args.dtype, "seed": args.seed}
    save(result, table(result), output)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this benchmark."""
    return new_parser(
        NAME,
        "Measure what loading a vector profile costs a busy server.",
        rounds=ROUNDS,
        seed="the drawn directions",
    )


def isolated(program: Program, folder: str, key: str) -> Program:
    """A program with a registry and an admin key of its own, whatever the caller exports."""
    own = {KEY_VARIABLE: key, "HEADWAY_HOME": folder, "VLLM_API_KEY": ""}
    return replace(program, environment={**program.environment, **own})


async def measure(
    url: str, model: str, geometry: ModelGeometry, key: str, rounds: int, seed: int
) -> Measurement:
    """Run all rounds against a server. Raises EndpointError, UnsteeredAnswer or RemoteError."""
    admin = Server(url, admin_key=key)
    measurement = Measurement()
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS) as http:
        stream = Stream(http, model)
        try:
            await stream.steps(8)
            # The first round also warms the code up and is not kept.
            for index in tqdm(range(-1, rounds), desc="measuring", unit="round", leave=False):
                profile = drawn_profile(geometry, seed + index + 1, geometry.num_layers)
                started = time.perf_counter()
                version = await asyncio.to_thread(_put, admin, profile)
                uploaded = time.perf_counter() - started
                first = await _use(http, model, version, stream)
                second = await _use(http, model, version, stream)
                if index >= 0:
                    measurement.uploads.append(uploaded)
                    measurement.first.append(first)
                    measurement.second.append(second)
        finally:
            await stream.close()
    await asyncio.to_thread(admin.delete_profile, PROFILE_NAME)
    return measurement


class Stream:
    """An unsteered request that never ends: when each of its tokens came."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self.times: list[float] = []
        self._http, self._model = http, model
        self._task = asyncio.create_task(self._run())

    async def steps(self, count: int) -> None:
        """Return after so many more tokens. Raises EndpointError if the stream broke off."""
        wanted = len(self.times) + count
        while len(self.times) < wanted:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.005)

    def pauses(self, start: float, stop: float) -> np.ndarray:
        """Seconds between tokens, of the pauses that lie in or reach into a span of time."""
        times = np.array(self.times)
        inside = (times[1:] >= start) & (times[:-1] <= stop)
        return np.diff(times)[inside]

    async def close(self) -> None:
        """End the request."""
        self._task.cancel()
        with suppress(asyncio.CancelledError, EndpointError):
            await self._task

    async def _run(self) -> None:
        body = {"model": self._model, "prompt": PROMPT, "max_tokens": STREAM_TOKENS}
        body |= {"ignore_eos": True, "stream": True, "temperature": 0}
        while True:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise EndpointError(f"HTTP {response.status_code}")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        self.times.append(time.perf_counter())


async def _use(http: httpx.AsyncClient, model: str, version: str, stream: Stream) -> Use:
    await stream.steps(6)
    steering = {"methods": [{"method": "gact", "profile": version}]}
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    started = time.perf_counter()
    answer = await http.post("/v1/completions", json={**body, "steering": steering})
    stopped = time.perf_counter()
    if answer.status_code != httpx.codes.OK:
        raise EndpointError(f"HTTP {answer.status_code}: {answer.text}")
    methods = (answer.json().get("steering") or {}).get("methods") or [{}]
    if methods[0].get("profile") != version:
        raise UnsteeredAnswer(f"the answer does not say that {version} steered it")
    await stream.steps(2)
    step = float(np.median(np.diff(stream.times[-200:])))
    return Use(stopped - started, float(stream.pauses(started, stopped).max()), step)


def _put(admin: Server, profile: VectorProfile) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "profile.safetensors")
        digest = profile.save(path)
        admin.put_artifact(digest, path.read_bytes())
    version, _ = admin.put_profile(PROFILE_NAME, {"artifact": f"sha256:{digest}"})
    return f"{PROFILE_NAME}@{version}"


def report(measurement: Measurement) -> dict[str, Any]:
    """Everything that was measured and what follows from it, as JSON values."""
    rows = []
    for name, values, unit, bar in (
        ("loading, on first use", measurement.loading(), "s", LOAD_BAR),
        ("stall of others", measurement.stalls(), "steps", STALL_BAR),
        ("upload", measurement.uploads, "s", None),
    ):
        found = bootstrap_median(values)
        row = {"name": name, "unit": unit, "bar": bar, "at_most": True, **asdict(found)}
        says = None if bar is None else str(verdict(found, bar, True))
        if unit == "steps":  # that others are never held up longer is no matter of the median
            says = str(Verdict.HOLDS if max(values) <= STALL_BAR else Verdict.FAILS)
        rows.append({**row, "largest": max(values), "verdict": says})
    return {
        "benchmark": "profile-loading",
        "rounds": len(measurement.uploads),
        "comparisons": rows,
        "runs": asdict(measurement),
        "step_seconds": float(np.median([use.step for use in measurement.second])),
        "server_settings": server_settings(),
        "environment": environment(),
        "warnings": [],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    step = f"a step of the stream takes {1000 * result['step_seconds']:.0f} ms"
    lines = ["", f"{result['rounds']} new profiles; {step}", ""]
    lines.append(f"{'':<24} {'median':>8} {'95 % interval':>20} {'largest':>8} {'bar':>6}  verdict")
    for row in result["comparisons"]:
        interval = f"{row['low']:.3f} .. {row['high']:.3f}"
        bar = f"{row['bar']:.1f}" if row["bar"] else ""
        line = f"{row['name'] + ', ' + row['unit']:<24} {row['value']:>8.3f} {interval:>20}"
        lines.append(f"{line} {row['largest']:>8.3f} {bar:>6}  {row['verdict'] or ''}".rstrip())
    return "\n".join(lines)
