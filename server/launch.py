"""Starts a server as a process of its own, `headway serve` for the demo and for benchmarks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tqdm import tqdm

START_SECONDS = 240
STOP_SECONDS = 60


class LaunchError(RuntimeError):
    """The server did not start, or did not end as it should."""


@dataclass(frozen=True)
class Program:
    """What serves a model.

    command: a module to run, and what comes before the model. ready: the path that answers 200
    once it is up. environment: variables that win over the caller's.
    """

    command: Sequence[str]
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)


HEADWAY = Program(("headway.server.cli", "serve"), "/v1/steering/capabilities")


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    pid: int


@contextmanager
def serve(
    model: Path,
    flags: Sequence[str],
    folder: Path,
    log: Path,
    settings: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A Headway server of `model`; yields its URL. See `running`."""
    with running(HEADWAY, model, flags, folder, log, settings) as server:
        yield server.url


@contextmanager
def running(
    program: Program,
    model: Path,
    flags: Sequence[str],
    folder: Path,
    log: Path,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """A server of `model` on a free port; yields once it answers, and ends it.

    folder: where it runs; log: the file for its output; settings: environment variables, where
    the caller's own environment does not set them. Raises LaunchError if it does not start, or
    does not end by itself with exit code 0.
    """
    port = free_port()
    command = [sys.executable, "-P", "-m", *program.command, str(model), *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        # The worker lives in the engine's process: one interpreter fewer to start.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **(settings or {}),
        **os.environ,
        **program.environment,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url + program.ready)
        yield Running(url, process.pid)
    finally:
        process.terminate()
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise LaunchError(f"the server did not end within {STOP_SECONDS} s") from None
    if code != 0:
        raise LaunchError(f"the server ended with exit code {code}")


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Return once the server answers a URL with 200. Raises LaunchError."""
    deadline = time.monotonic() + START_SECONDS
    with tqdm(bar_format="{elapsed}", leave=False, disable=None) as progress:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise LaunchError(f"the server ended at its start, exit code {process.returncode}")
            try:
                if httpx.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
            progress.refresh()
    raise LaunchError(f"the server did not start within {START_SECONDS} s")


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
