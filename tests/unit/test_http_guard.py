"""Steering on endpoints that cannot steer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from headway.server.http import guard
from headway.server.http.guard import SteeringGuard, find_steering
from tests.unit.test_http_exchange import make_state

pytestmark = pytest.mark.unit


def client(root_path: str = "", state: Any = None) -> httpx.AsyncClient:
    app = FastAPI(root_path=root_path)
    app.state.headway = state
    app.add_middleware(SteeringGuard, steerable={"/v1/completions"})

    @app.post("/{path:path}")
    async def echo(path: str, request: Request) -> dict[str, Any]:
        return {"path": path, "body": (await request.body()).decode("latin-1")}

    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a", "steering": {"preset": "x"}}, "steering"),
        ({"input": "a", "steering": 0}, "steering"),
        ({"input": "a", "vllm_xargs": {"steering": "{}"}}, "vllm_xargs.steering"),
    ],
)
async def test_steering_is_refused(body: dict[str, Any], param: str) -> None:
    response = await client().post("/v1/embeddings", json=body)
    error = response.json()["error"]
    assert response.status_code == error["code"] == 400
    assert (error["reason"], error["param"]) == ("E_UNSUPPORTED", param)
    assert "/v1/embeddings" in error["message"]


async def test_an_escaped_key_is_seen() -> None:
    body = b'{"\\u0073teering": {"preset": "x"}}'
    headers = {"content-type": "application/json"}
    response = await client().post("/pooling", content=body, headers=headers)
    assert response.status_code == 400


@pytest.mark.parametrize(
    "encoding",
    ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
async def test_a_body_in_any_encoding_of_json_is_seen(encoding: str) -> None:
    body = '{"input": "\U0001f600\ud800", "steering": {"preset": "x"}}'
    content = body.encode(encoding, "surrogatepass")
    headers = {"content-type": "application/json"}
    response = await client().post("/v1/embeddings", content=content, headers=headers)
    assert response.status_code == 400
    start = '{"steering": {'.encode(encoding)
    assert find_steering(start, whole=False) is not None
    plain = '{"input": "steering"}'.encode(encoding)
    response = await client().post("/v1/embeddings", content=plain, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("model", "any_model", "status"),
    [
        ("base:quiet", True, 400),
        ("whatever:quiet", True, 400),
        ("base:unknown", True, 200),
        ("served:quiet", True, 200),
        ("base", True, 200),
        (["base:quiet"], True, 200),
        ("base:quiet", False, 200),  # vLLM has no such model, and says so
    ],
)
async def test_an_alias_is_refused_where_every_name_is_the_model(
    model: Any, any_model: bool, status: int
) -> None:
    state = make_state()
    state.any_model = any_model
    state.models = SimpleNamespace(  # type: ignore[assignment]
        is_base_model=lambda name: name in ("base", "served:quiet"), lora_requests={}
    )
    state.presets = {"quiet": None}  # type: ignore[dict-item]
    body = {"model": model, "input": "x"}
    response = await client(state=state).post("/v1/embeddings", json=body)
    assert response.status_code == status
    if status == 400:
        error = response.json()["error"]
        assert (error["reason"], error["param"]) == ("E_UNSUPPORTED", "model")


@pytest.mark.parametrize(
    "body",
    [
        {"input": "steering"},
        {"input": {"steering": 1}},
        {"steering": None},
        {"vllm_xargs": {"other": "steering"}},
        ["steering"],
        {},
    ],
    ids=str,
)
async def test_other_bodies_pass_unchanged(body: Any) -> None:
    response = await client().post("/v1/embeddings", json=body)
    assert response.status_code == 200
    assert json.loads(response.json()["body"]) == body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/completions/", "/v1/steering/compile"])
async def test_steerable_paths_judge_for_themselves(path: str) -> None:
    response = await client().post(path, json={"steering": {}}, follow_redirects=True)
    assert response.status_code == 200


async def test_a_root_path_is_not_part_of_the_path() -> None:
    body = {"steering": {}}
    assert (await client("/api").post("/api/v1/completions", json=body)).status_code == 200
    assert (await client("/api").post("/api/v1/embeddings", json=body)).status_code == 400


async def test_forms_and_broken_json_pass() -> None:
    form = await client().post("/v1/audio", data={"steering": "x"})
    assert form.status_code == 200
    headers = {"content-type": "application/json"}
    broken = await client().post("/v1/embeddings", content=b'{"steering": ', headers=headers)
    assert broken.status_code == 200


async def test_bodies_in_pieces_are_replayed() -> None:
    async def pieces() -> Any:
        for piece in (b'{"in', b'put": "', b"a" * 5000, b'"}'):
            yield piece

    headers = {"content-type": "application/json"}
    response = await client().post("/v1/embeddings", content=pieces(), headers=headers)
    assert json.loads(response.json()["body"]) == {"input": "a" * 5000}


async def test_of_a_huge_body_the_start_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)

    async def pieces(start: bytes) -> Any:
        yield start
        for _ in range(4):
            yield b"a" * 500
        yield b'"}'

    headers = {"content-type": "application/json"}
    plain = pieces(b'{"input": "')
    response = await client().post("/v1/embeddings", content=plain, headers=headers)
    assert len(response.json()["body"]) == 2013
    steered = pieces(b'{"steering": {}, "input": "')
    response = await client().post("/v1/embeddings", content=steered, headers=headers)
    assert response.status_code == 400


def test_nesting_beyond_the_parser_passes() -> None:
    assert find_steering(b'{"steering":' + b"[" * 200_000) is None
