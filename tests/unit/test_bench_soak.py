"""`headway bench soak` on made-up results: its limits, comparisons, report and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from headway.benchmarks import soak, soak_parity, soak_watch
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.soak_answers import Problem
from headway.benchmarks.soak_asks import CHAT, COMPLETIONS, Ask
from headway.benchmarks.soak_checks import Limit, Soak, by_kind, by_status, growth, limits
from headway.benchmarks.soak_load import Outcome, Sample
from headway.benchmarks.soak_parity import Kept, Parity, Tokens, compare, compare_all
from headway.benchmarks.soak_report import broken, report, table
from headway.benchmarks.soak_session import Target
from headway.benchmarks.soak_watch import Memory, listening_pid, readings, settled
from headway.server.launch import LaunchError, Running
from tests.soaks import SECONDS, made_soak

pytestmark = pytest.mark.unit

FACTS = {"model": "SmolLM2", "dtype": "float32", "seed": 0, "concurrency": 16, "attached": False}


def failing(found: Soak) -> list[str]:
    return [limit.name.partition(" (")[0] for limit in limits(found) if limit.is_broken]


def spoiled(**changed: Any) -> Callable[[Soak], Soak]:
    """A soak with one more outcome."""

    def change(found: Soak) -> Soak:
        first = Outcome("one method", 0.0, 1.0, 200, steered=True)
        return replace(found, outcomes=[*found.outcomes, replace(first, **changed)])

    return change


def after(name: str, value: float | None) -> Callable[[Soak], Soak]:
    return lambda found: replace(found, after=found.after | {name: value})


def grown(share: float) -> Callable[[Soak], Soak]:
    def change(found: Soak) -> Soak:
        end = 0.9 * SECONDS
        memory = [(at, 2000.0 * (1 + share * (at >= end))) for at, _ in found.memory]
        return replace(found, memory=memory)

    return change


BROKEN = [
    (spoiled(status=500, problem=Problem.SERVER_ERROR), "unexpected 5xx"),
    (
        spoiled(status=500, problem=Problem.SERVER_ERROR, refused=True, steered=False),
        "unexpected 5xx",
    ),
    (spoiled(status=None, problem=Problem.CONNECTION), "connection errors"),
    (spoiled(problem=Problem.ECHO), "steered answers without their echo"),
    (spoiled(problem=Problem.TRACE, steered=False), "unsteered answers that show steering"),
    (spoiled(status=429, problem=Problem.REFUSED), "good requests refused"),
    (spoiled(problem=Problem.INCOMPLETE), "incomplete answers"),
    (
        spoiled(problem=Problem.WRONG_ERROR, refused=True, steered=False),
        "bad requests not refused as they should be",
    ),
    (after("withheld as unsteered", 1.0), "withheld as unsteered"),
    (after("failures of steering", 2.0), "failures of steering"),
    (after("slots in use", 1.0), "slots in use at the end"),
    (after("active steered requests", 1.0), "active steered requests at the end"),
    (after("running requests", 1.0), "running requests at the end"),
    (after("waiting requests", 3.0), "waiting requests at the end"),
    (after("share of the KV cache in use", 0.01), "share of the KV cache in use at the end"),
    (grown(0.051), "growth of memory"),
    (
        lambda found: replace(found, parity=Parity([Kept.EQUAL, Kept.DIFFERS], ["differs: "])),
        "unsteered answers that differ from stock vLLM",
    ),
]


def test_a_good_soak_keeps_every_limit() -> None:
    found = limits(made_soak())
    assert all(limit.is_judged for limit in found), found
    assert failing(made_soak()) == []
    (ties,) = [limit.note for limit in found if "stock" in limit.name]
    assert ties == "of 9; 1 more are ties of stock vLLM itself"


@pytest.mark.parametrize(("spoil", "name"), BROKEN, ids=[name for _, name in BROKEN])
def test_each_limit_can_be_broken_alone(spoil: Callable[[Soak], Soak], name: str) -> None:
    assert failing(spoil(made_soak())) == [name]


def test_what_a_counter_had_before_is_not_of_the_soak() -> None:
    found = made_soak()
    found.before["failures of steering"] = found.after["failures of steering"] = 7.0
    assert failing(found) == []


def test_what_could_not_be_judged_does_not_hold() -> None:
    few = made_soak(memory=[], memory_kind=None, parity=None)
    few.outcomes = [each for each in few.outcomes if not each.steered and not each.refused]
    few.after["slots in use"] = few.after["withheld as unsteered"] = None
    few.after["failures of steering"] = None  # no failure, no series
    open_ = {limit.name.partition(" (")[0] for limit in limits(few) if not limit.is_judged}
    assert open_ == {
        "bad requests not refused as they should be",
        "steered answers without their echo",
        "withheld as unsteered",
        "slots in use at the end",
        "growth of memory",
        "unsteered answers that differ from stock vLLM",
    }
    assert failing(few) == []


def test_growth_is_of_medians_after_the_warm_up() -> None:
    assert failing(grown(0.049)(made_soak())) == []
    memory = [(float(at), 1000.0 if at < 0.2 * SECONDS else 2000.0) for at in range(600)]
    assert growth(memory, SECONDS) == (2000.0, 2000.0)
    memory[590] = (590.0, 9000.0)  # a spike is no growth
    assert growth(memory, SECONDS) == (2000.0, 2000.0)
    assert growth(memory[:300], SECONDS) is None


def test_a_short_soak_shows_growth_without_a_verdict() -> None:
    memory = [(at / 10, 2000.0 + 300.0 * (at > 500)) for at in range(600)]
    (limit,) = [
        each for each in limits(replace(made_soak(memory=memory), seconds=60.0))
        if "growth" in each.name
    ]  # fmt: skip
    assert limit.value == pytest.approx(0.15)
    assert limit.verdict.startswith("not judged: shorter")


def test_times_are_of_answers_that_came_to_their_end() -> None:
    outcomes = [*made_soak().outcomes, Outcome("one method", 0.0, 99.0, 200, left=True)]
    rows = {row["kind"]: row for row in by_kind(outcomes, SECONDS)}
    assert rows["one method"]["seconds_p99"] == 1.5 and rows["one method"]["first_p50"] == 0.2
    assert rows["one method"]["requests"] == 101 and rows["one method"]["left"] == 1
    assert rows["bad request"]["refused"] == 100 and rows["bad request"]["seconds_p50"] == 0.01
    assert rows["client that leaves"]["seconds_p50"] is None
    answers = [(row["status"], row["reason"], row["answers"]) for row in by_status(outcomes)]
    assert answers == [(200, None, 200), (400, "E_BAD_PARAM", 100)]


# Comparison with stock vLLM


def tokens(*ids: int, finish: str = "length", best: float = -0.5, second: float = -3.0) -> Tokens:
    """Each token at `best`, token 9 at `second` everywhere."""
    names = tuple(f"token_id:{number}" for number in ids)
    tops = tuple({name: best, "token_id:9": second} for name in names)
    return Tokens(names, (best,) * len(ids), tops, finish)


@pytest.mark.parametrize(
    ("ours", "stock", "greedy", "kept"),
    [
        (tokens(1, 2, 3), tokens(1, 2, 3), True, Kept.EQUAL),
        (tokens(1, 2, best=-0.5001), tokens(1, 2), True, Kept.EQUAL),
        (tokens(1, 2, best=-0.6), tokens(1, 2), True, Kept.DIFFERS),
        (tokens(1, 9, 4), tokens(1, 2, 3), True, Kept.DIFFERS),
        (tokens(1, 9, 4), tokens(1, 2, 3, second=-0.5004), True, Kept.TIE),
        (tokens(1, 9, 4), tokens(1, 2, 3, second=-0.5004), False, Kept.DIFFERS),
        (tokens(1, 8, 4), tokens(1, 2, 3), True, Kept.DIFFERS),
        (tokens(1, 2), tokens(1, 2, 3), True, Kept.DIFFERS),
        (tokens(1, 2, finish="stop"), tokens(1, 2), True, Kept.DIFFERS),
    ],
)
def test_answers_are_equal_tied_or_different(
    ours: Tokens, stock: Tokens, greedy: bool, kept: Kept
) -> None:
    found, what = compare(ours, stock, greedy, 1e-3)
    assert found is kept
    assert bool(what) == (kept is not Kept.EQUAL)


def answer(path: str, ids: list[int]) -> dict[str, Any]:
    """As vLLM has it with `return_tokens_as_token_ids`."""
    names = [f"token_id:{number}" for number in ids]
    if path == CHAT:
        rows = [
            {"token": n, "logprob": -0.5, "top_logprobs": [{"token": n, "logprob": -0.5}]}
            for n in names
        ]
        logprobs: dict[str, Any] = {"content": rows}
    else:
        tops = [{name: -0.5} for name in names]
        logprobs = {"tokens": names, "token_logprobs": [-0.5] * len(ids), "top_logprobs": tops}
    return {"choices": [{"finish_reason": "length", "logprobs": logprobs}]}


async def compared(
    monkeypatch: pytest.MonkeyPatch, samples: list[Sample], stock: Callable[[dict], list[int]]
) -> tuple[Parity, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    async def respond(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        return httpx.Response(200, json=answer(request.url.path, stock(body)))

    class Client(httpx.AsyncClient):
        def __init__(self, **options: Any) -> None:
            options.pop("limits")
            super().__init__(**options, transport=httpx.MockTransport(respond))

    monkeypatch.setattr(soak_parity.httpx, "AsyncClient", Client)
    return await compare_all("http://stock", "stock-name", samples, 1e-3), seen


def sample(seed: int | None, ids: list[int], path: str = CHAT, **body: Any) -> Sample:
    options = {"temperature": 0.0} if seed is None else {"temperature": 0.9, "seed": seed}
    return Sample(path, {"model": "ours", **options, **body}, answer(path, ids))


async def test_stock_is_asked_the_same_without_steering(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(None, [1, 2], steering={"methods": []}), sample(5, [1, 2], COMPLETIONS)]
    parity, seen = await compared(monkeypatch, samples, lambda body: [1, 2])
    assert parity.kept == [Kept.EQUAL, Kept.EQUAL] and parity.largest == 0.0
    assert seen == [
        {"model": "stock-name", "temperature": 0.0},
        {"model": "stock-name", "temperature": 0.9, "seed": 5},
    ]


async def test_an_answer_that_stock_gives_in_other_company_is_a_tie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def stock(body: dict[str, Any]) -> list[int]:
        if body.get("seed") != 7:
            return [1]
        asked.append(7)
        return [4] if len(asked) >= 3 else [3]

    samples = [sample(7, [4]), *(sample(seed, [1]) for seed in range(20, 40))]
    parity, seen = await compared(monkeypatch, samples, stock)
    assert parity.kept[0] is Kept.TIE and parity.count(Kept.EQUAL) == 20
    assert len(seen) == 21 + (1 + 3) + (1 + 7)
    assert "beside 7" in parity.details[0]


async def test_an_answer_that_stock_never_gives_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    parity, _ = await compared(monkeypatch, [sample(7, [4]), sample(8, [1])], lambda body: [1])
    assert parity.kept == [Kept.DIFFERS, Kept.EQUAL]
    assert "token_id:4" in parity.details[0]


async def test_stock_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client(httpx.AsyncClient):
        def __init__(self, **options: Any) -> None:
            transport = httpx.MockTransport(lambda request: httpx.Response(400, text="no"))
            super().__init__(base_url="http://stock", transport=transport)

    monkeypatch.setattr(soak_parity.httpx, "AsyncClient", Client)
    with pytest.raises(EndpointError, match="400 no"):
        await compare_all("http://stock", "m", [sample(1, [1])], 1e-3)


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
    kept = bytearray(64 * 2**20)
    kept[::4096] = b"x" * len(kept[::4096])
    assert memory.mib() > before + 50
    assert kept[0]


def test_the_process_that_listens_is_found() -> None:
    import socket

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


def test_how_the_server_ended_is_a_warning(fake: FakeBench, tmp_path: Path) -> None:
    fake.end = LaunchError("the server ended with exit code 3")
    code, result = run(tmp_path)
    assert code == 0 and "the server ended with exit code 3" in result["warnings"]


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
