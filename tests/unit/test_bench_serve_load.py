"""The load of `headway bench serve`: vLLM's own client against a small HTTP server, and checks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from headway.benchmarks.quality.client import EndpointError, UnsteeredAnswer
from headway.benchmarks.serve_load import Load, pictures, shortcoming, texts
from headway.benchmarks.serve_matrix import IMAGE_CONTEXT, Cell
from headway.server.models.smollm2 import ensure_smollm2

pytestmark = pytest.mark.unit

BATCH, CONTEXT, TOKENS = 3, 20, 4
WAIT = 0.02
SPECS = [{"methods": [{"method": "locore", "beta": 0.1 * index}]} for index in (1, 2, 3)]
STEERED = Cell("locore", "headway", "all", BATCH, CONTEXT, 3, "text")
ONE = Cell("locore", "headway", "one", BATCH, CONTEXT, 1, "text")
IDLE = Cell("unsteered", "headway", "none", BATCH, CONTEXT, 0, "text")


class FakeServer:
    """Answers only once `BATCH` requests wait, a token every `WAIT` seconds, and keeps reports."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.reports: dict[str, dict[str, Any]] = {}
        self.together = threading.Barrier(BATCH, timeout=10)
        self.lock = threading.Lock()
        self.hits = 0
        self.status = 200
        self.missing = 0  # tokens that do not come
        self.prompt_tokens: int | None = None

    def report(self, spec: dict[str, Any]) -> dict[str, Any]:
        return {
            "fingerprint": json.dumps(spec),
            "identity": False,
            "methods": spec["methods"],
            "positions_edited": 5,
        }

    def stream(self, path: str, headers: Any, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        is_chat = path == "/v1/chat/completions"
        name = ("chatcmpl-" if is_chat else "cmpl-") + headers["x-request-id"]
        with self.lock:
            salts = [each["cache_salt"] for each in self.bodies if each["max_tokens"] == 1]
            self.hits += CONTEXT * (body["cache_salt"] in salts and body["max_tokens"] > 1)
            self.bodies.append(body)
            if "steering" in body:
                self.reports[name] = self.report(body["steering"])
        self.together.wait()
        if is_chat:
            time.sleep(WAIT)
            yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        number = body["max_tokens"] - self.missing
        for index in range(number):
            if not is_chat or index:
                time.sleep(WAIT)
            yield {"choices": [{"delta": {"content": "a"}} if is_chat else {"text": "a"}]}
        prompt = self.prompt_tokens or len(body.get("prompt", ()))
        yield {"choices": [], "usage": {"completion_tokens": number, "prompt_tokens": prompt}}


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    served = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body.setdefault("max_tokens", body.get("max_completion_tokens"))
            self.send_response(served.status)
            self.end_headers()
            if served.status == 200:
                for chunk in served.stream(self.path, self.headers, body):
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")

        def do_GET(self) -> None:
            if self.path == "/metrics":
                status, text = 200, f'vllm:prefix_cache_hits_total{{engine="0"}} {served.hits}.0\n'
            else:
                found = served.reports.get(self.path.removeprefix("/v1/steering/reports/"))
                status, text = 200 if found else 404, json.dumps(found)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *ignored: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{http.server_address[1]}"  # type: ignore[attr-defined]
        yield served
        http.shutdown()


def load(fake: Any, cell: Cell) -> Load:
    server: Any = SimpleNamespace(url=fake.url, model="m")
    prompts = ({"prompt": [number] * (CONTEXT + 1)} for number in count())
    contents = pictures(0) if cell.modality == "image" else prompts
    return Load(cell, server, SPECS[: cell.configurations], contents, TOKENS)


def test_a_run_asks_twice_and_all_at_once(fake: FakeServer) -> None:
    asked = load(fake, STEERED)
    run = asked.run()
    assert run.tokens == BATCH * TOKENS
    assert [len(times) for times in (run.ttft, run.tpot, run.e2e, run.warm_ttft)] == [BATCH] * 4
    assert len(run.itl) == BATCH * (TOKENS - 1)
    assert min(run.itl + run.tpot + run.ttft) > WAIT / 2
    assert min(run.e2e) > WAIT * TOKENS * 0.9 and run.seconds > max(run.e2e)
    assert all(WAIT / 2 < warm < e2e for warm, e2e in zip(run.warm_ttft, run.e2e, strict=True))
    assert run.tokens_per_second == BATCH * TOKENS / run.seconds
    assert run.cached == pytest.approx(CONTEXT / (CONTEXT + 1))
    cold, full = fake.bodies[:BATCH], fake.bodies[BATCH:]
    assert {body["max_tokens"] for body in cold} == {1}
    assert {body["max_tokens"] for body in full} == {TOKENS}
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in fake.bodies)
    prompts = [sorted(body["prompt"][0] for body in burst) for burst in (cold, full)]
    assert prompts == [[0, 1, 2]] * 2
    strengths = sorted(body["steering"]["methods"][0]["beta"] for body in full)
    assert strengths == pytest.approx([0.1, 0.2, 0.3])
    asked.run()
    assert len({body["cache_salt"] for body in fake.bodies}) == 2


@pytest.mark.parametrize(("cell", "steered"), [(ONE, 1), (IDLE, 0)])
def test_a_share_of_the_requests_is_steered(fake: FakeServer, cell: Cell, steered: int) -> None:
    load(fake, cell).run()
    for burst in (fake.bodies[:BATCH], fake.bodies[BATCH:]):
        assert sum("steering" in body for body in burst) == steered


def test_pictures_are_asked_about_by_chat(fake: FakeServer) -> None:
    fake.prompt_tokens = IMAGE_CONTEXT + 1
    asked = load(fake, Cell("vhr", "headway", "all", BATCH, IMAGE_CONTEXT, 3, "image"))
    run = asked.run()
    assert len(run.itl) == BATCH * (TOKENS - 1) and min(run.itl) > WAIT / 2  # no gap to the role
    asked.run()
    contents = [json.dumps(body["messages"]) for body in fake.bodies]
    assert len(set(contents[: 2 * BATCH])) == BATCH and len(set(contents)) == 2 * BATCH


def spoil(**fields: Any) -> Any:
    return lambda self, spec: {**REPORT(self, spec), **fields}


REPORT = FakeServer.report


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (lambda *_: {}, "has no report"),
        (spoil(identity=True), "asks for"),
        (spoil(methods=[]), "got nothing"),
        (spoil(positions_edited=0), "no position edited"),
        (spoil(fingerprint="same"), "1 configurations, not 3"),
    ],
)
def test_an_answer_that_was_not_steered_ends_the_run(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, report: Any, message: str
) -> None:
    monkeypatch.setattr(FakeServer, "report", report)
    with pytest.raises(UnsteeredAnswer, match=message):
        load(fake, STEERED).run()


def test_a_request_that_is_steered_unasked_ends_the_run(fake: FakeServer) -> None:
    asked = load(fake, ONE)
    fake.reports |= {"cmpl-first": REPORT(fake, SPECS[0]), "cmpl-mate": REPORT(fake, SPECS[0])}
    asked.check(["first", "other"], TOKENS)
    with pytest.raises(UnsteeredAnswer, match="request 1 asks for nothing"):
        asked.check(["first", "mate"], TOKENS)


def test_failed_and_short_answers_are_errors(fake: FakeServer) -> None:
    fake.prompt_tokens = CONTEXT
    with pytest.raises(EndpointError, match=f"1 tokens came for {CONTEXT}, not 1 for"):
        load(fake, IDLE).run()
    fake.prompt_tokens, fake.missing = None, -1
    with pytest.raises(EndpointError, match="2 tokens came"):
        load(fake, IDLE).run()
    fake.status = 400
    with pytest.raises(EndpointError, match=f"{IDLE.name}: Bad Request"):
        load(fake, IDLE).run()


def test_a_gate_must_have_judged_every_token() -> None:
    spec = {"methods": [{"method": "sgrs"}]}
    report = {"methods": [{"method": "sgrs", "draws": 7}], "identity": False}
    assert shortcoming({**report, "positions_edited": 0}, spec, 7) is None
    assert "7 candidates judged for 8" in str(shortcoming(report, spec, 8))


def test_a_first_token_may_come_from_unedited_positions() -> None:
    report = {"methods": SPECS[0]["methods"], "identity": False, "positions_edited": 0}
    assert shortcoming(report, SPECS[0], 1) is None
    assert shortcoming(report, SPECS[0], 2) is not None


@pytest.mark.parametrize("length", [129, 4097])
def test_prompts_are_prose_and_no_two_begin_alike(length: int) -> None:
    found = texts(ensure_smollm2(), length, seed=0)
    prompts = [next(found)["prompt"] for _ in range(32)]
    assert {len(prompt) for prompt in prompts} == {length}
    assert len({tuple(prompt[:16]) for prompt in prompts[:16]}) == 16
    assert prompts[16:] == prompts[:16]
    assert next(texts(ensure_smollm2(), length, seed=1))["prompt"] not in prompts
