"""A real Headway server on SmolLM2, one for the whole test session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from headway.server.launch import free_port

PRESETS = {
    "quiet": {
        "description": "Two heads switched off.",
        "methods": [{"method": "head_ablation", "heads": [[3, 1], [10, 4]]}],
    },
    "loud": {"methods": [{"method": "vhr", "alpha": 3.0, "heads": [[0, 0], [5, 2], [20, 8]]}]},
}
MODEL = "smollm2-135m-instruct"  # as `make serve` names it, and the examples of the README
COLON_MODEL = "org:smollm2"
ADMIN_KEY = "admin-key-of-the-tests"
FLAGS = (
    *("--served-model-name", MODEL, COLON_MODEL),
    *("--dtype", "float32"),
    *("--max-model-len", "1024"),
    *("--max-num-seqs", "32"),
    "--enforce-eager",
    "--enable-prompt-tokens-details",
    "--enable-scale-out",
    *("--steering-api-key", ADMIN_KEY),
    *("--max-vector-memory", "1"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
SERVE = (sys.executable, "-m", "headway.server.cli", "serve")
START_SECONDS = 180


class Server:
    """Where the server is, and how to talk to it."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.process = process
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def metric(self, name: str, /, **labels: str) -> float:
        """The value of a metric now, 0 where it was never touched."""
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        series = f"{name}{{{wanted}}}" if wanted else name
        for line in self.http.get("/metrics/").text.splitlines():
            key, _, value = line.rpartition(" ")
            if key == series:
                return float(value)
        return 0.0


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server; ended when the session ends."""
    from headway.server.models.smollm2 import ensure_smollm2

    folder = tmp_path_factory.mktemp("server")
    presets = []
    for name, preset in PRESETS.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(preset))
        presets += ["--steering-preset", f"{name}={path}"]
    yield from running_server(folder, ensure_smollm2(), (*FLAGS, *presets))


def running_server(
    folder: Path,
    model: str | Path,
    flags: Sequence[str],
    settings: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server of a model with these flags; it ends when the iterator does.

    settings: environment variables that it has besides those of this process. headers: of all
    requests.
    """
    port = free_port()
    log = folder / "server.log"
    address = ("--host", "127.0.0.1", "--port", str(port))
    command = [*SERVE, str(model), *flags, *address]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "HF_HUB_OFFLINE": "1",
        "HEADWAY_HOME": str(folder / "home"),
        **(settings or {}),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
    try:
        running = Server(port, log, process)
        running.http.headers.update(headers or {})
        wait_until_ready(running, process)
        yield running
    finally:
        stop(process)


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Returns once the server lists its models; fails with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if server.http.get("/v1/models").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{server.log.read_text()[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its engine processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
