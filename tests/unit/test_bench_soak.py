"""`headway bench soak`: what it watches, its report, its servers and its exit codes."""

from __future__ import annotations

import json
import mmap
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from headway.benchmarks import soak, soak_session, soak_watch
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.soak_answers import Problem
from headway.benchmarks.soak_asks import CHAT, Ask, Place
from headway.benchmarks.soak_checks import Limit, Soak
from headway.benchmarks.soak_load import Driver
from headway.benchmarks.soak_parity import Kept, Parity
from headway.benchmarks.soak_report import broken, report, table
from headway.benchmarks.soak_session import Target, run_soak
from headway.benchmarks.soak_watch import Memory, listening_pid, readings, settled
from headway.server.launch import LaunchError, Running
from tests.engine.harness import GEOMETRY
from tests.soaks import after, made_soak, spoiled

pytestmark = pytest.mark.unit

FACTS = {"model": "SmolLM2", "dtype": "float32", "seed": 0, "concurrency": 16, "attached": False}


# Watching


METRICS = """\
# TYPE headway_slots gauge
headway_slots{state="free"} 14.0
headway_slots{state="used"} 2.0
# TYPE headway_failures counter
headway_failures_total{stage="edit"} 1.0
headway_failures_total{stage="report"} 2.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
"""


def test_readings_are_sums_over_the_other_labels() -> None:
    found = readings(METRICS)
    assert found["slots in use"] == 2.0 and found["failures of steering"] == 3.0
    assert found["running requests"] == 4.0 and found["waiting requests"] is None


async def test_settling_waits_until_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_watch, "STATISTICS_SECONDS", 0.0)
    monkeypatch.setattr(soak_watch, "POLL_SECONDS", 0.0)
    states = iter([(2, 2, 2), (0, 2, 2), (0, 1, 1), (0, 1, 0), (0, 0, 0), (9, 9, 9), (9, 9, 9)])
    asked: list[bool] = []

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            active, slots, running = next(states)
            text = f'headway_active_requests {active}\nheadway_slots{{state="used"}} {slots}\n'
            return httpx.Response(200, text=text + f"vllm:num_requests_running {running}\n")
        asked.append("steering" in json.loads(request.content))
        return httpx.Response(200, json={})

    last = Ask("last", CHAT, {"steering": {}}, steered=True)
    transport = httpx.MockTransport(respond)
    async with httpx.AsyncClient(base_url="http://test", transport=transport) as http:
        found = await settled(http, last)
        assert found["slots in use"] == found["running requests"] == 0.0
        assert asked == [True, False]
        monkeypatch.setattr(soak_watch, "SETTLE_SECONDS", 0.0)
        assert (await settled(http, last))["slots in use"] == 9.0


def test_memory_is_of_the_whole_tree() -> None:
    memory = Memory(psutil.Process().pid)
    assert memory.kind in ("PSS", "RSS")
    before = memory.mib()
    # New pages: a piece of the heap may have been in use before.
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        kept[::4096] = b"x" * len(kept[::4096])
        assert memory.mib() > before + 50


def test_the_process_that_listens_is_found() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        assert listening_pid(port) == psutil.Process().pid
    assert listening_pid(port) is None


# The report and the command


def test_the_report_says_what_was_found() -> None:
    found = spoiled(status=500, problem=Problem.SERVER_ERROR, detail="POST /v1: boom")(made_soak())
    found.left_out = {"sgrs": "switched off"}
    result = json.loads(json.dumps(report(found, FACTS, ["the server ended with exit code 1"])))
    assert result["benchmark"] == "soak"
    assert broken(result) == ["unexpected 5xx"]
    assert result["totals"]["output tokens per second"] == 100.0
    assert result["parity"] == {"equal": 9, "tie": 1, "differs": 0, "largest_difference": 2e-6}
    assert "one method: unexpected 5xx: POST /v1: boom" in result["problems"]
    text = table(result)
    for words in ("boom", "2.0%", "left out, sgrs", "exit code 1", "E_BAD_PARAM", "one method"):
        assert words in text
    assert Limit(**result["limits"][0]).is_broken


class FakeBench:
    """Stands for servers: what was started, in order; a soak or an error of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Soak) -> None:
        self.started: list[tuple[str, list[str], dict[str, str]]] = []
        self.targets: list[Target] = []
        self.end: LaunchError | None = None
        self.stock: Exception | None = None
        self.found = found
        monkeypatch.setattr(soak.launch, "running", self.running)
        monkeypatch.setattr(soak, "run_soak", self.run_soak)
        monkeypatch.setattr(soak, "compare_all", self.compare_all)
        monkeypatch.setattr(soak, "chosen_model", lambda given: Path("/models/m"))
        monkeypatch.setattr(soak, "interpreter_refusal", lambda: None)
        monkeypatch.setattr(soak, "cuda_device", lambda: None)

    @contextmanager
    def running(self, program: Any, model: Path, flags: Any, *_: Any) -> Iterator[Running]:
        self.started.append((program.command[0], list(flags), dict(program.environment)))
        yield Running("http://server", 1)
        if len(self.started) == 1 and self.end:
            raise self.end

    async def run_soak(self, target: Target, dtype: str, *rest: Any) -> Soak:
        self.targets.append(target)
        self.rest = rest
        return self.found

    async def compare_all(self, *_: Any) -> Parity:
        if self.stock:
            raise self.stock
        return Parity([Kept.EQUAL])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBench:
    monkeypatch.delenv("HEADWAY_STEERING_API_KEY", raising=False)
    return FakeBench(monkeypatch, made_soak(parity=None))


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    output = tmp_path / "soak.json"
    code = soak.main([*options, "--output", str(output)])
    return code, json.loads(output.read_text()) if output.exists() else {}


def test_headway_ends_before_stock_vllm_starts(fake: FakeBench, tmp_path: Path) -> None:
    code, result = run(tmp_path, "--quick")
    assert code == 0 and result["parity"]["equal"] == 1 and result["attached"] is False
    (headway, flags, own), (stock, stock_flags, plain) = fake.started
    assert (headway, stock) == (
        "headway.server.cli",
        "vllm.entrypoints.openai.api_server",
    )
    assert flags == stock_flags and "float32" in flags
    # The registry and the keys are those of this soak, whatever the caller has.
    assert own["HEADWAY_STEERING_API_KEY"] == fake.targets[0].key and own["HEADWAY_HOME"]
    assert plain == {"VLLM_PLUGINS": ""}
    assert fake.rest == (60.0, 16, 0)


def test_a_broken_limit_is_exit_code_1(
    fake: FakeBench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.found = after("slots in use", 1.0)(fake.found)
    code, result = run(tmp_path, "--minutes", "0.5", "--seed", "3", "--concurrency", "4")
    assert code == 1 and fake.rest == (30.0, 4, 3)
    assert "broken: slots in use" in capsys.readouterr().err


def test_a_server_that_does_not_end_well_breaks_a_limit(fake: FakeBench, tmp_path: Path) -> None:
    fake.end = LaunchError("the server ended with exit code 3")
    code, result = run(tmp_path)
    assert code == 1 and broken(result) == ["bad ends of the server"]
    assert "the server: the server ended with exit code 3" in result["warnings"]
    assert "MALLOC_TRIM_THRESHOLD_" in result["server_settings"]


async def test_a_server_that_dies_meanwhile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if died:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, text="")

    async def prepare(driver: Driver, dtype: str) -> tuple[Place, dict[str, str]]:
        return Place("m", GEOMETRY, 1024, frozenset(), ()), {}

    async def traffic(driver: Driver, *_: Any) -> None:
        died.append(True)

    died: list[bool] = []
    transport = httpx.MockTransport(respond)
    monkeypatch.setattr(
        soak_session, "Driver", lambda url, key, headers: Driver(url, key, headers, transport)
    )
    monkeypatch.setattr(soak_session, "prepare", prepare)
    monkeypatch.setattr(Driver, "run", traffic)
    found = await run_soak(Target("http://test", None, "k"), "float32", 1.0, 4, 0)
    assert found.gone and "ConnectError" in found.gone
    assert set(found.after.values()) == {None}
    result = json.loads(json.dumps(report(found, FACTS)))
    assert set(broken(result)) == {"connection errors", "bad ends of the server"}
    assert any("does not answer at the end" in each for each in result["warnings"])
    assert "does not answer at the end" in table(result)


def test_stock_vllm_that_does_not_answer_leaves_a_limit_open(
    fake: FakeBench, tmp_path: Path
) -> None:
    fake.stock = EndpointError("no")
    code, result = run(tmp_path)
    assert code == 0 and "stock vLLM: no" in result["warnings"]
    (limit,) = [each for each in result["limits"] if "stock" in each["name"]]
    assert limit["verdict"].startswith("not judged")


def test_a_server_that_is_up_can_be_soaked(
    fake: FakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "listening_pid", lambda port: {8000: 7}.get(port))
    url = ["--url", "http://localhost:8000/v1", "--without-stock"]
    assert run(tmp_path, *url) == (1, {})  # no admin key
    code, result = run(tmp_path, *url, "--steering-api-key", "k", "--api-key", "a")
    assert code == 0 and result["attached"] is True and not fake.started
    target = fake.targets[-1]
    assert (target.url, target.pid, target.key) == ("http://localhost:8000", 7, "k")
    assert target.headers == {"Authorization": "Bearer a"}


def test_the_interpreter_is_refused(
    fake: FakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "interpreter_refusal", lambda: "TRITON_INTERPRET is set")
    assert run(tmp_path) == (2, {})
    assert fake.started == []
