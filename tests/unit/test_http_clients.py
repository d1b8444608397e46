"""Who sent a request, and what keeps the prefix caches and reports of clients apart."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers
from vllm import envs
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.serve.middleware import register
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreRequest, async_llm, core_client

from headway.server.http.clients import ANONYMOUS, CLIENT, Clients, NamesClients, current_client
from headway.server.http.isolation import SECRET_VARIABLE, check_isolation, isolate, salt_of
from headway.server.http.state import ReportStore

pytestmark = pytest.mark.unit

KEYS = ("key-one", "kéy-two")


@pytest.fixture(autouse=True)
def fresh_environment() -> None:
    """vLLM keeps the environment that it has read once a service has started in this process."""
    envs.disable_envs_cache()


def bearer(key: str, scheme: str = "Bearer") -> Headers:
    return Headers({"Authorization": f"{scheme} {key}"})


def test_a_client_is_known_by_the_hash_of_its_key() -> None:
    clients = Clients(KEYS)
    assert clients.identify(bearer("key-one")) == hashlib.sha256(b"key-one").hexdigest()
    assert clients.identify(bearer("key-one", "bearer")) == clients.identify(bearer("key-one"))
    assert clients.identify(bearer("kéy-two")) == hashlib.sha256("kéy-two".encode()).hexdigest()
    for headers in (
        Headers({}),
        bearer("wrong"),
        bearer("key-one", "Basic"),
        bearer(""),
        bearer(" key-one"),
    ):
        assert clients.identify(headers) == ANONYMOUS
    assert Clients().identify(bearer("key-one")) == ANONYMOUS
    assert "key-one" not in repr(vars(clients))


def test_keys_are_those_that_vllm_guards_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    of_environment = Clients.of(Namespace(api_key=None))
    assert of_environment.identify(bearer("of-the-environment")) != ANONYMOUS
    given = Clients.of(Namespace(api_key=["given"]))
    assert given.identify(bearer("given")) != ANONYMOUS
    assert given.identify(bearer("of-the-environment")) == ANONYMOUS
    assert "(args.api_key or [envs.VLLM_API_KEY])" in inspect.getsource(register)


async def test_whatever_serves_a_request_knows_its_client() -> None:
    app = FastAPI()
    app.add_middleware(NamesClients)
    app.state.headway = SimpleNamespace(clients=Clients(KEYS))

    @app.get("/who")
    async def who() -> list[str]:
        task = asyncio.create_task(asyncio.to_thread(current_client))
        return [current_client(), await task]

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        known = hashlib.sha256(b"key-one").hexdigest()
        headers = {"Authorization": "Bearer key-one"}
        assert (await client.get("/who", headers=headers)).json() == [known, known]
        assert (await client.get("/who")).json() == [ANONYMOUS, ANONYMOUS]
    assert CLIENT.get() is None


def test_a_salt_is_of_one_client_and_one_salt_of_its_own() -> None:
    pairs = [(client, salt) for client in ("a", "b", ANONYMOUS) for salt in (None, "x", "y")]
    salts = [salt_of("secret", *pair) for pair in pairs]
    assert len(set(salts)) == len(pairs)
    assert salts == [salt_of("secret", *pair) for pair in pairs]
    assert salt_of("other", "a", None) != salt_of("secret", "a", None)
    # Nothing that a client gives makes the salt of another.
    assert salt_of("secret", "a", salt_of("secret", "b", None)) not in salts
    for salt in salts:
        validate_cache_salt(salt)


def test_a_request_of_nobody_shares_with_nobody() -> None:
    assert salt_of("secret", None, None) != salt_of("secret", None, None)


class Core:
    """Stands for vLLM's client of the engine core."""

    def __init__(self) -> None:
        self.salts: list[str | None] = []

    async def add_request_async(self, request: Any) -> None:
        self.salts.append(request.cache_salt)


async def test_every_request_to_the_engine_is_salted() -> None:
    core = Core()
    isolate(SimpleNamespace(engine_core=core), "secret")
    for client in ("a", "b"):
        token = CLIENT.set(client)
        for salt in (None, "mine"):
            request = SimpleNamespace(cache_salt=salt)
            await asyncio.create_task(core.add_request_async(request))
        CLIENT.reset(token)
    wanted = [salt_of("secret", client, salt) for client in "ab" for salt in (None, "mine")]
    assert core.salts == wanted


def test_what_isolation_relies_on_in_vllm() -> None:
    """One call takes every request to the engine core; its salt is in the first block's key."""
    assert "cache_salt" in EngineCoreRequest.__struct_fields__
    adds = (async_llm.AsyncLLM.add_request, async_llm.AsyncLLM._add_request)
    for function in adds:
        assert "await self.engine_core.add_request_async(" in inspect.getsource(function)
    source = inspect.getsource(async_llm)
    assert not any(f"engine_core.{name}(" in source for name in ("add_request", "add_requests"))
    parameters = inspect.signature(core_client.AsyncMPClient.add_request_async).parameters
    assert list(parameters) == ["self", "request"]
    keys = inspect.getsource(kv_cache_utils.generate_block_hash_extra_keys)
    assert '[("cache_salt", request.cache_salt)]' in keys


def arguments(**values: Any) -> Namespace:
    return Namespace(**{"isolate_tenants": True, "api_key": ["a", "b"], **values})


def test_isolation_makes_a_secret_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_RESPONSES_API_STORE", raising=False)
    environment: dict[str, str] = {}
    check_isolation(arguments(), environment)
    made = environment[SECRET_VARIABLE]
    assert len(made) == 64
    check_isolation(arguments(), environment)
    assert environment == {SECRET_VARIABLE: made}, "that of the operator stays"


def test_isolation_that_would_not_isolate_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_ENABLE_RESPONSES_API_STORE", raising=False)
    with pytest.raises(ValueError, match="give --api-key"):
        check_isolation(arguments(api_key=None), {})
    environment: dict[str, str] = {}
    check_isolation(arguments(isolate_tenants=False), environment)
    assert not environment and "2 API keys share a prefix cache" in capsys.readouterr().err
    check_isolation(arguments(isolate_tenants=False, api_key=["a"]), environment)
    assert not capsys.readouterr().err
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_RESPONSES_API_STORE"):
        check_isolation(arguments(), {})


def test_a_report_is_for_the_client_that_asked() -> None:
    store = ReportStore(capacity=3)
    store.put("chatcmpl-1", {"of": "a"}, "a")
    assert store.get("chatcmpl-1", "b") is None and store.get("chatcmpl-1") is None
    store.put("chatcmpl-1", {"of": "b"}, "b")  # ids are chosen by clients
    assert store.get("chatcmpl-1", "a") == b'{"of":"a"}'
    assert store.get("chatcmpl-1", "b") == b'{"of":"b"}'
    assert store.knows("chatcmpl-1") and not store.knows("chatcmpl-2")
