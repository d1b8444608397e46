"""`headway bench soak` for a minute: mixed traffic on the shared server, and every limit held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from headway.benchmarks.soak_traffic import KINDS
from tests.server.conftest import ADMIN_KEY, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

UNJUDGED = {"growth of memory (PSS of all its processes)"}
"""A minute is too short to tell growth from caches that fill; the soak of ten minutes judges it."""


@pytest.fixture(scope="module")
def result(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a soak of the server that other tests have."""
    output = tmp_path_factory.mktemp("soak") / "soak.json"
    command = [sys.executable, "-m", "headway.server.cli", "bench", "soak", "--quick"]
    command += ["--url", server.url, "--steering-api-key", ADMIN_KEY, "--output", str(output)]
    # No benchmark runs under the interpreter, which tests have on for the kernels.
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_every_limit_holds(result: dict[str, Any]) -> None:
    open_ = {each["name"] for each in result["limits"] if each["verdict"] != "holds"}
    assert open_ <= UNJUDGED, result["limits"]


def test_the_soak_had_something_to_judge(result: dict[str, Any]) -> None:
    limits = {each["name"]: each for each in result["limits"]}
    assert int(limits["steered answers without their echo"]["note"].removeprefix("of ")) > 20
    assert result["parity"]["equal"] >= 5
    assert len({row["kind"] for row in result["traffic"]} & set(KINDS)) >= len(KINDS) - 3
    assert not result["warnings"]  # no method was left out
    memory = result["memory"]
    assert memory["of"] == "PSS" and len(memory["samples"]) > 20


def test_the_registry_is_as_it_was(result: dict[str, Any], server: Server) -> None:
    for kind in ("profiles", "presets"):
        shown = server.http.get(f"/v1/steering/{kind}").json()["data"]
        assert not [each for each in shown if each["name"].startswith("soak-")]
