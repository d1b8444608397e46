"""The `vllm.endpoint_plugins` entry point: Headway's routes on vLLM's server.

vLLM symbols relied on: `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`; routes attached
here replace vLLM's of the same path and method.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from headway.server.engine.client import SteeringClient
from headway.server.engine.config import is_enabled
from headway.server.engine.geometry import geometry_of
from headway.server.http import metrics, models, routes, steering_routes
from headway.server.http.errors import steering_error_handler
from headway.server.http.guard import SteeringGuard
from headway.server.http.presets import load_presets
from headway.server.http.prompts import check_rendered_prompts
from headway.server.http.state import SteeringState
from headway.steering import SteeringError


class HeadwayEndpoints:
    """Steerable OpenAI routes, the steering routes, and the guard for all others."""

    name = "headway"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register routes, errors and the guard, which runs after vLLM's API-key check."""
        for module in (routes, models, steering_routes):
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

        geometry = geometry_of(vllm_config)
        client = SteeringClient(engine_client)
        state.headway = SteeringState(
            vllm_config=vllm_config,
            geometry=geometry,
            client=client,
            models=state.openai_serving_models,
            presets=load_presets(getattr(args, "steering_preset", None) or [], geometry),
            any_model=bool(envs.VLLM_SKIP_MODEL_NAME_VALIDATION),
        )
        check_rendered_prompts(engine_client)
        poll = metrics.STATISTICS.poll_forever(client)
        state.headway_poll = asyncio.create_task(poll, name="headway statistics")
