"""Bodies of routes that steer: bounded in size and time, otherwise handed on as they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from headway.server.http import metrics
from headway.server.http.bodies import BoundsBodies
from headway.server.http.limits import Limits
from headway.server.http.plugin import HeadwayEndpoints

pytestmark = pytest.mark.unit

MIB = 1024 * 1024
CHAT = "/v1/chat/completions"
BOUNDED = [("POST", CHAT), ("POST", f"{CHAT}/"), ("PUT", "/v1/steering/presets/p")]
OTHERS = [("POST", "/v1/embeddings"), ("PUT", f"/v1/steering/artifacts/sha256:{'0' * 64}")]


def make_client(seconds: int = 60, root_path: str = "") -> httpx.AsyncClient:
    app = FastAPI(root_path=root_path)
    app.add_middleware(BoundsBodies, steerable={CHAT})
    limits = Limits(max_request_body=1, request_body_timeout=seconds)
    app.state.headway = SimpleNamespace(limits=limits)

    @app.api_route("/{path:path}", methods=["POST", "PUT", "GET"])
    async def size(path: str, request: Request) -> dict[str, Any]:
        body = await request.body()
        return {"bytes": len(body), "start": body[:8].decode()}

    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def pieces(count: int, size: int = MIB // 4, seconds: float = 0.0) -> AsyncIterator[bytes]:
    for _ in range(count):
        await asyncio.sleep(seconds)
        yield b"a" * size


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == answer.status_code
    return error


@pytest.mark.parametrize(("method", "path"), BOUNDED)
async def test_a_body_that_is_too_large_is_refused(method: str, path: str) -> None:
    client = make_client()
    before = metrics.REFUSED.labels(reason="E_TOO_LARGE")._value.get()
    declared = await client.request(method, path, content=b"a" * (MIB + 1))
    in_pieces = await client.request(method, path, content=pieces(5))
    for answer in (declared, in_pieces):
        error = error_of(answer)
        assert (answer.status_code, error["reason"], error["param"]) == (413, "E_TOO_LARGE", "body")
        assert f"{MIB} bytes" in error["message"] and "--max-request-body" in error["message"]
    assert metrics.REFUSED.labels(reason="E_TOO_LARGE")._value.get() == before + 2


async def test_no_more_is_read_than_is_allowed() -> None:
    taken = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal taken
        async for piece in pieces(100):
            taken += len(piece)
            yield piece

    assert (await make_client().post(CHAT, content=counted())).status_code == 413
    assert taken <= MIB + MIB // 4


@pytest.mark.parametrize(("method", "path"), BOUNDED)
async def test_a_body_within_the_limit_is_handed_on(method: str, path: str) -> None:
    answer = await make_client().request(method, path, content=pieces(4))
    assert answer.json() == {"bytes": MIB, "start": "aaaaaaaa"}
    answer = await make_client().request(method, path, content=b"")
    assert answer.json() == {"bytes": 0, "start": ""}


@pytest.mark.parametrize(("method", "path"), OTHERS)
async def test_other_bodies_pass(method: str, path: str) -> None:
    answer = await make_client().request(method, path, content=pieces(5))
    assert answer.json()["bytes"] == 5 * MIB // 4


async def test_a_root_path_is_not_part_of_the_path() -> None:
    client = make_client(root_path="/api")
    assert (await client.post(f"/api{CHAT}", content=pieces(5))).status_code == 413


async def test_a_slow_body_is_given_up() -> None:
    client = make_client(seconds=1)
    started = asyncio.get_running_loop().time()
    answer = await client.post(CHAT, content=pieces(100, 10, 0.2))
    error = error_of(answer)
    assert (answer.status_code, error["reason"], error["param"]) == (408, "E_TIMEOUT", "body")
    assert "1 seconds" in error["message"] and answer.headers["connection"] == "close"
    assert asyncio.get_running_loop().time() - started < 5


def test_who_asks_is_known_before_anything_is_read() -> None:
    """vLLM's check of API keys is added later, and so comes before all of them."""
    app = FastAPI()
    HeadwayEndpoints().attach_router(app)
    order = [each.cls.__name__ for each in app.user_middleware]  # type: ignore[attr-defined]
    assert order == ["NamesClients", "RefusesLateRequests", "BoundsBodies", "SteeringGuard"]


async def test_a_client_that_goes_away_is_left_alone() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("there is nobody to serve")

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pytest.fail("there is nobody to answer")

    state = SimpleNamespace(headway=SimpleNamespace(limits=Limits()))
    scope: Any = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    scope["app"] = SimpleNamespace(state=state)
    await BoundsBodies(app, {CHAT})(scope, receive, send)
