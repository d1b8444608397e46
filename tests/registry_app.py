"""An app with the routes of steering over a registry, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI
from vllm.entrypoints.serve.engine.protocol import ModelCard

from headway.server.http import feedback_routes, metrics, models, registry_routes, steering_routes
from headway.server.http.admin import AdminKeys
from headway.server.http.carriage import Carriage
from headway.server.http.errors import steering_error_handler
from headway.server.http.state import SteeringState
from headway.server.registry.registry import Registry
from headway.server.registry.store import Store
from headway.steering import SteeringError
from headway.steering.profiles import NamedProfiles
from tests.registry import GEOMETRY, digest_of

KEY = {"Authorization": "Bearer right"}


class Models:
    """Stands in for vLLM's list of models."""

    base_model_paths = [SimpleNamespace(name="base")]
    lora_requests: dict[str, Any] = {}

    def is_base_model(self, name: str) -> bool:
        return name == "base"

    async def show_available_models(self) -> Any:
        data = [ModelCard(id="base")]
        return SimpleNamespace(data=data, model_dump=lambda: {"ids": [card.id for card in data]})


class Server:
    """An app with the routes of steering over a registry in a folder, and how to call it."""

    def __init__(
        self, root: Path, keys: AdminKeys, given: Any = None, presets: tuple[str, ...] = ()
    ) -> None:
        geometry = replace(GEOMETRY, profiles=NamedProfiles(given or {}))
        found = metrics.FoundVersions()
        hooks = found.note, found.forget
        self.registry = Registry(geometry, Store(root), keys, presets, *hooks)
        parallel = SimpleNamespace(decode_context_parallel_size=1)
        config = SimpleNamespace(speculative_config=None, parallel_config=parallel)
        client: Any = None
        listed: Any = Models()
        self.state = SteeringState(
            config,
            self.registry.geometry,
            client,
            listed,
            self.registry.presets,
            registry=self.registry,
        )
        self.app = FastAPI()
        for module in (models, steering_routes, registry_routes, feedback_routes):
            self.app.include_router(module.router)
        self.app.add_exception_handler(SteeringError, steering_error_handler)
        self.app.state.headway = self.state

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            path = path if path.startswith("/v1") else f"/v1/steering/{path}"
            return await client.request(method, path, **{"headers": KEY, **options})

    async def ok(self, method: str, path: str, **options: Any) -> Any:
        answer = await self.call(method, path, **options)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    async def put_vectors(self, content: bytes) -> str:
        digest = f"sha256:{digest_of(content)}"
        await self.ok("PUT", f"artifacts/{digest}", content=content)
        return digest

    def resolve(self, **steering: Any) -> Any:
        """The program that a request would get."""
        body = SimpleNamespace(model=steering.pop("model", "base"))
        carriages = [Carriage(steering, "steering")] if steering else []
        found = self.state.resolve(carriages, body.model, body)
        assert found is not None
        return found.program


def refused(answer: httpx.Response, status: int, reason: str, words: str = "") -> None:
    """The answer is an error in the shape of OpenAI's."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["reason"]) == (status, status, reason), error
    assert error["type"] and error["param"] and words in error["message"]


def files(server: Server) -> list[str]:
    """Names of all files of its registry but for the lock."""
    paths = server.registry.store.root.rglob("*")
    return [path.name for path in paths if path.is_file() and path.name != ".lock"]
