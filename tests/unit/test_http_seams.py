"""What the HTTP layer takes for granted about vLLM; a release that moves it fails here."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from vllm.entrypoints.generate.api_router import (
    init_generate_state,
    register_generate_api_routers,
)
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.openai.models.api_router import attach_router as register_models
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.plugins.endpoint_plugins import interface
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins

from headway.server.http.plugin import HeadwayEndpoints
from headway.server.http.routes import ENDPOINTS
from headway.server.http.streams import FINISH, NO_CHOICES
from headway.steering import SteeringError

pytestmark = pytest.mark.unit


def make_app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    plugin = HeadwayEndpoints()
    assert isinstance(plugin, EndpointPlugin)
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [plugin])
    app = FastAPI()
    register_models(app)
    register_generate_api_routers(app)
    attach_endpoint_plugins(app, ("generate",))
    return app


def test_our_routes_replace_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(monkeypatch)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    replaced = [("POST", endpoint.path) for endpoint in ENDPOINTS] + [("GET", "/v1/models")]
    for method, path in replaced:
        found = [route for route in routes if route.path == path and method in route.methods]
        modules = [route.endpoint.__module__ for route in found]
        assert len(found) == 1 and modules[0].startswith("headway."), (path, modules)


def test_vllms_other_routes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {getattr(route, "path", None) for route in make_app(monkeypatch).routes}
    for path in ("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"):
        assert path in paths
    assert SteeringError in make_app(monkeypatch).exception_handlers


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_the_stock_route_serves_through_the_handler(endpoint: Any) -> None:
    code = endpoint.stock_route
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    assert code.__code__.co_varnames[:2] == ("request", "raw_request")
    assert endpoint.create in code.__code__.co_names


def test_a_response_is_generated_by_a_method_that_gets_the_prompt() -> None:
    """By keyword, before the response has begun; `prompts.py` takes its place on the object."""
    parameters = inspect.signature(OpenAIServingResponses._generate_with_builtin_tools).parameters
    assert list(parameters)[:4] == ["self", "request_id", "engine_input", "sampling_params"]
    source = inspect.getsource(OpenAIServingResponses._create_responses)
    call = source.partition("self._generate_with_builtin_tools(")[2].partition(")\n")[0]
    for name in ("request_id", "engine_input", "sampling_params"):
        assert f"{name}=" in call
    stated = inspect.getsource(init_generate_state)
    assert "state.openai_serving_responses" in stated


def test_the_chunks_that_may_be_last_are_known_by_their_text() -> None:
    def chat(finish: str | None) -> str:
        choice = ChatCompletionResponseStreamChoice(
            index=0, delta=DeltaMessage(content='finish_reason":"'), finish_reason=finish
        )
        chunk = ChatCompletionStreamResponse(model="m", choices=[choice])
        return chunk.model_dump_json(exclude_unset=True)

    def text(finish: str | None) -> str:
        choice = CompletionResponseStreamChoice(
            index=0, text='finish_reason":"', finish_reason=finish
        )
        return CompletionStreamResponse(model="m", choices=[choice]).model_dump_json(
            exclude_unset=False
        )

    for dump in (chat, text):
        assert FINISH not in dump(None)
        assert FINISH in dump("stop")
    usage = UsageInfo(prompt_tokens=1, total_tokens=1)
    for model in (ChatCompletionStreamResponse, CompletionStreamResponse):
        last = model(model="m", choices=[], usage=usage)
        assert NO_CHOICES in last.model_dump_json(exclude_none=True)


def test_how_vllm_ends_a_server() -> None:
    """SIGTERM shuts the engine client down, the server can be found, the dead engine told."""
    source = inspect.getsource(launcher.serve_http)
    for words in ("partial(engine_client.shutdown", "app.state.server = server"):
        assert words in source
    assert "async_llm.shutdown(" in inspect.getsource(entry)
    assert "plugin.init_state(engine_client, state, args)" in inspect.getsource(interface)
    worker = inspect.getsource(entry.build_and_serve)
    assert "init_app_state(engine_client, app.state, args, supported_tasks)" in worker
    assert "timeout_graceful_shutdown" in inspect.signature(uvicorn.Config).parameters


async def test_endpoints_without_the_engine_do_not_start() -> None:
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    state: Any = SimpleNamespace()
    with pytest.raises(ValueError, match="additional-config"):
        await HeadwayEndpoints().init_state(engine, state, SimpleNamespace())  # type: ignore[arg-type]
