"""The `vllm.endpoint_plugins` entry point: Headway's routes on vLLM's server.

vLLM symbols relied on: `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`; routes attached
here replace vLLM's of the same path and method; `ParallelConfig._api_process_rank` and
`_api_process_count`, which tell the API servers of an engine apart.
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
from headway.server.engine.logs import write_as_vllm
from headway.server.http import (
    feedback_routes,
    metrics,
    models,
    observation,
    registry_routes,
    routes,
    steering_routes,
)
from headway.server.http.admin import AdminKeys
from headway.server.http.bodies import BoundsBodies
from headway.server.http.clients import Clients, NamesClients
from headway.server.http.errors import steering_error_handler
from headway.server.http.guard import SteeringGuard
from headway.server.http.isolation import SECRET_VARIABLE, isolate
from headway.server.http.lifetime import Lifetime, RefusesLateRequests, bound_exit
from headway.server.http.limits import Limits
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
        app.add_middleware(BoundsBodies, steerable=routes.STEERABLE_PATHS)
        app.add_middleware(RefusesLateRequests)
        app.add_middleware(NamesClients)

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
            lifetime=Lifetime(engine_client),
            tracer=observation.tracer_of(vllm_config),
            clients=Clients.of(args),
            limits=Limits.of(args),
        )
        if getattr(args, "isolate_tenants", False):
            isolate(engine_client, os.environ[SECRET_VARIABLE])
        state.headway.lifetime.watch()
        args.headway_lifetime = state.headway.lifetime  # for `headway serve`: how it ended
        check_rendered_prompts(engine_client, state.openai_serving_responses)
        write_as_vllm()
        observation.LOGGER.disabled = bool(getattr(args, "disable_steering_log", False))
        state.headway_poll = poll_statistics(client, vllm_config.parallel_config)
        state.headway_exit = asyncio.create_task(bound_exit(state), name="headway exit")


def poll_statistics(client: Any, parallel: Any) -> asyncio.Task[None] | None:
    """Have the first of the API servers ask the workers: others would count the same again.

    client: a `SteeringClient`. parallel: vLLM's `ParallelConfig`.
    """
    if parallel._api_process_rank != 0:
        return None
    poll = metrics.STATISTICS.poll_forever(client, shared=parallel._api_process_count > 1)
    return asyncio.create_task(poll, name="headway statistics")


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
