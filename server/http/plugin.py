"""The `vllm.endpoint_plugins` entry point: Headway's routes on vLLM's server.

vLLM symbols relied on: `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`; routes attached
here replace vLLM's of the same path and method.
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from headway.server.engine.client import SteeringClient
from headway.server.engine.config import is_enabled
from headway.server.engine.geometry import geometry_of
from headway.server.http import (
    feedback_routes,
    metrics,
    models,
    registry_routes,
    routes,
    steering_routes,
)
from headway.server.http.admin import AdminKeys
from headway.server.http.errors import steering_error_handler
from headway.server.http.guard import SteeringGuard
from headway.server.http.prompts import check_rendered_prompts
from headway.server.http.state import SteeringState
from headway.server.registry.registry import Registry
from headway.server.registry.store import Store
from headway.steering import ModelGeometry, SteeringError
from headway.steering.vectors import given_artifacts


class HeadwayEndpoints:
    """Steerable OpenAI routes, the steering routes, and the guard for all others."""

    name = "headway"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register routes, errors and the guard, which runs after vLLM's API-key check."""
        for module in (routes, models, steering_routes, registry_routes, feedback_routes):
            app.include_router(module.router)
        app.add_exception_handler(SteeringError, steering_error_handler)
        app.add_middleware(SteeringGuard, steerable=routes.STEERABLE_PATHS)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Make `state.headway`. Raises ValueError, which ends the start, on a bad preset."""
        vllm_config = engine_client.vllm_config
        if not is_enabled(vllm_config):
            message = "start the server with --additional-config '{\"headway\": {}}'"
            raise ValueError(f"Headway's endpoints are loaded but its engine is not: {message}")
        from vllm import envs

        presets = getattr(args, "steering_preset", None) or []
        geometry = geometry_of(vllm_config)
        registry = await asyncio.to_thread(open_registry, geometry, presets)
        client = SteeringClient(engine_client)
        state.headway = SteeringState(
            vllm_config=vllm_config,
            geometry=registry.geometry,
            client=client,
            models=state.openai_serving_models,
            presets=registry.presets,
            any_model=bool(envs.VLLM_SKIP_MODEL_NAME_VALIDATION),
            registry=registry,
            resident=frozenset(given_artifacts(geometry)),
        )
        check_rendered_prompts(engine_client)
        poll = metrics.STATISTICS.poll_forever(client)
        state.headway_poll = asyncio.create_task(poll, name="headway statistics")


def open_registry(geometry: ModelGeometry, presets: Sequence[str]) -> Registry:
    """The registry of this server, cleared of what a crash left. Raises ValueError: a bad preset.

    presets: options `name=path`.
    """
    try:
        store = Store()
    except RuntimeError as error:  # a user without a home
        raise ValueError(f"set HEADWAY_HOME to the folder of the registry: {error}") from None
    store.remove_leftovers()
    found = metrics.FOUND_VERSIONS
    keys = AdminKeys.of(os.environ)
    return Registry(geometry, store, keys, presets, found.note, found.forget)
