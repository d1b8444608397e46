"""`headway serve` as a process: several API servers, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from headway.server.launch import free_port
from headway.server.models.smollm2 import ensure_smollm2

pytestmark = [pytest.mark.engine, pytest.mark.slow]

METHODS = [{"method": "vhr", "alpha": 2.0, "heads": [[4, 0], [11, 5]]}]
START_SECONDS = 240


def test_two_api_servers_know_the_preset_and_end_cleanly(tmp_path: Path) -> None:
    preset = tmp_path / "loud.json"
    preset.write_text(json.dumps({"methods": METHODS}))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--api-server-count", "2", "--steering-preset", f"loud={preset}"]
    process = start(tmp_path, port, options)
    try:
        wait_until(lambda: answers(f"{url}/v1/steering/capabilities"), process, tmp_path)
        # A new connection each time: either server may take it.
        for _ in range(8):
            shown = httpx.get(f"{url}/v1/steering/capabilities").json()
            assert shown["presets"] == ["loud"]
        body = {"model": "m:loud", "prompt": "The sea", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["steering"]["positions_edited"] > 0
        assert_ends_cleanly(process, signal.SIGTERM, tmp_path)
    finally:
        kill_all(process)


def test_an_interrupt_during_the_start_ends_it_cleanly(tmp_path: Path) -> None:
    process = start(tmp_path, free_port(), [])
    try:
        wait_until(lambda: len(children(process)) > 0, process, tmp_path)
        time.sleep(3)
        assert_ends_cleanly(process, signal.SIGINT, tmp_path)
    finally:
        kill_all(process)


def start(folder: Path, port: int, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "headway.server.cli", "serve", str(ensure_smollm2())]
    command += ["--served-model-name", "m", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "server.log").open("w") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
        )


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if ready():
            return
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log(folder)}")


def assert_ends_cleanly(
    process: subprocess.Popen[bytes], signum: signal.Signals, folder: Path
) -> None:
    descendants = children(process)
    process.send_signal(signum)
    assert process.wait(60) == 0, log(folder)
    _, alive = psutil.wait_procs(descendants, timeout=15)
    # A zombie has ended; whoever adopted it has not asked for its exit code yet.
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], log(folder)


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for each in [*children(process), process]:
            each.kill()
        process.wait()


def log(folder: Path) -> str:
    return (folder / "server.log").read_text()[-4000:]
