"""A server that is ending takes no more requests, says so, and ends in bounded time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from headway.server.http import metrics
from headway.server.http.lifetime import EXIT_SECONDS, Lifetime, RefusesLateRequests, bound_exit

pytestmark = pytest.mark.unit


class Engine:
    """Stands for vLLM's AsyncLLM."""

    def __init__(self) -> None:
        self.errored = False
        self.ended_with: Any = None

    def shutdown(self, timeout: float | None = None) -> str:
        self.ended_with = timeout
        return "ended"


def server(engine: Engine | None = None, root_path: str = "") -> tuple[FastAPI, httpx.AsyncClient]:
    app = FastAPI(root_path=root_path)
    app.add_middleware(RefusesLateRequests)
    if engine is not None:
        app.state.headway = SimpleNamespace(lifetime=Lifetime(engine))
        app.state.headway.lifetime.watch()

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def served(path: str) -> str:
        return path

    transport = httpx.ASGITransport(app=app)
    return app, httpx.AsyncClient(transport=transport, base_url="http://test")


WRITES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("PUT", "/v1/steering/presets/x"),
    ("DELETE", "/v1/steering/profiles/x"),
    ("GET", "/v1/models"),
    ("GET", "/v1/steering/capabilities"),
    ("GET", "/v1/steering/capabilities/"),
]
READS = [("GET", "/health"), ("GET", "/metrics/"), ("GET", "/v1/steering/reports/x")]


@pytest.mark.parametrize("how", ["shutdown", "death"])
@pytest.mark.parametrize(("method", "path"), WRITES)
async def test_what_comes_too_late_is_refused(how: str, method: str, path: str) -> None:
    engine = Engine()
    _, client = server(engine)
    assert (await client.request(method, path)).status_code == 200
    if how == "shutdown":
        assert engine.shutdown(timeout=7) == "ended" and engine.ended_with == 7
    else:
        engine.errored = True
    before = metrics.REFUSED.labels(reason="E_UNAVAILABLE")._value.get()
    answer = await client.request(method, path)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 503
    assert (error["reason"], error["type"]) == ("E_UNAVAILABLE", "ServiceUnavailableError")
    assert {"shutdown": "shutting down", "death": "died"}[how] in error["message"]
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["connection"] == "close"
    assert metrics.REFUSED.labels(reason="E_UNAVAILABLE")._value.get() == before + 1


@pytest.mark.parametrize(("method", "path"), READS)
async def test_what_only_looks_is_answered_to_the_end(method: str, path: str) -> None:
    engine = Engine()
    _, client = server(engine)
    engine.shutdown()
    assert (await client.request(method, path)).status_code == 200


@pytest.mark.parametrize("died", [False, True])
def test_whether_the_engine_died_is_told_by_how_it_was_before_it_was_shut_down(died: bool) -> None:
    engine = Engine()
    lifetime = Lifetime(engine)
    lifetime.watch()
    engine.errored = died
    engine.shutdown()
    engine.errored = True  # as every engine that was shut down
    engine.shutdown()
    assert lifetime.engine_died is died


async def test_paths_are_told_below_a_root_path_too() -> None:
    engine = Engine()
    _, client = server(engine, root_path="/base")
    engine.shutdown()
    assert (await client.get("/base/v1/models")).status_code == 503
    assert (await client.get("/base/health")).status_code == 200


async def test_a_server_that_is_not_ready_yet_or_has_no_engine_is_not_ending() -> None:
    _, client = server()
    assert (await client.post("/v1/chat/completions")).status_code == 200
    assert Lifetime().ending is None


@pytest.mark.parametrize(("asked", "expected"), [(None, EXIT_SECONDS), (3, 3)])
async def test_the_wait_for_connections_is_bounded(asked: int | None, expected: int) -> None:
    state: Any = SimpleNamespace()
    waiting = asyncio.create_task(bound_exit(state))
    await asyncio.sleep(0.02)
    state.server = SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=asked))
    await asyncio.wait_for(waiting, 2)
    assert state.server.config.timeout_graceful_shutdown == expected
