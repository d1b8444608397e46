"""What the steering routes share: the model's sizes, the presets, the engine, past requests."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from headway.server.engine.client import SteeringClient
from headway.server.engine.config import (
    max_vector_bytes,
    refuse_unsupported,
    unsupported_request,
)
from headway.server.engine.held_artifacts import HeldArtifacts
from headway.server.http.carriage import Carriage, single, split_alias
from headway.server.http.clients import ANONYMOUS, Clients
from headway.server.http.errors import steering_failure
from headway.server.http.lifetime import Lifetime
from headway.server.http.limits import Limits, Places
from headway.server.http.presets import Preset
from headway.server.registry.feedback import FeedbackCollector
from headway.server.registry.readings import ReadingStore
from headway.server.registry.registry import Registry
from headway.steering import (
    ModelGeometry,
    Reason,
    SteeringError,
    SteeringProgram,
    SteeringSpec,
    compile_spec,
)
from headway.steering.compile import Presets

MAX_REPORTS = 1024
"""Finished reports kept for GET /v1/steering/reports/{request_id}; the oldest go first."""

MAX_REPORT_BYTES = 64 * 1024 * 1024
"""Most bytes of them together, as JSON; a full report of a large model has several MB."""

FOREIGN_DECODING = ("use_beam_search",)
"""Request fields that decode outside the seam that steering goes through."""


@dataclass(frozen=True)
class ResolvedSteering:
    """The steering of a request, compiled; `model` is the base model it is for."""

    spec: SteeringSpec
    program: SteeringProgram
    model: str | None


class ReportStore:
    """The last reports by client and response id: clients may choose ids, and see others'."""

    def __init__(self, capacity: int = MAX_REPORTS, max_bytes: int = MAX_REPORT_BYTES) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._size = 0
        self._reports: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def put(self, request_id: str, report: dict[str, Any], client: str = ANONYMOUS) -> None:
        """Keep a report, forgetting the oldest beyond the capacity; one too large alone is not."""
        content = json.dumps(report, separators=(",", ":")).encode()
        self._size -= len(self._reports.pop((client, request_id), b""))
        if len(content) > self._max_bytes:
            return
        self._reports[client, request_id] = content
        self._size += len(content)
        while len(self._reports) > self._capacity or self._size > self._max_bytes:
            self._size -= len(self._reports.popitem(last=False)[1])

    def get(self, request_id: str, client: str = ANONYMOUS) -> bytes | None:
        """The JSON of the report of a client's response, None if there is none (any more)."""
        return self._reports.get((client, request_id))

    def knows(self, request_id: str) -> bool:
        """Whether there is a report of a response, of whatever client."""
        return any(known == request_id for _, known in list(self._reports))


@dataclass
class SteeringState:
    """One per API server, on `app.state.headway`."""

    vllm_config: Any
    geometry: ModelGeometry
    client: SteeringClient
    models: OpenAIServingModels
    presets: Mapping[str, Preset] = field(default_factory=dict)
    any_model: bool = False  # whether vLLM takes every model name for the model it serves
    registry: Registry | None = None  # None for a dry run
    reports: ReportStore = field(default_factory=ReportStore)
    resident: frozenset[str] = frozenset()  # artefacts that the workers have had since the start
    lifetime: Lifetime = field(default_factory=Lifetime)
    tracer: Any = None  # OpenTelemetry's, where vLLM traces
    clients: Clients = field(default_factory=Clients)
    limits: Limits = field(default_factory=Limits)
    places: Places = field(init=False)
    held: HeldArtifacts = field(init=False)
    users: Counter[str] = field(default_factory=Counter)  # running requests of a vector profile
    readings: ReadingStore = field(default_factory=ReadingStore)
    feedback: FeedbackCollector | None = field(init=False, default=None)  # None for a dry run
    _files: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        limit = max_vector_bytes(self.vllm_config)
        self.held = HeldArtifacts(self.client, limit, self.resident)
        self.places = Places(self.limits)
        if self.registry is not None:
            self.registry.in_use = lambda digest: self.users[digest] > 0
            self.feedback = FeedbackCollector(self.registry, self.readings, self.reports.knows)

    def is_served(self, model: str) -> bool:
        """Whether `model` is a served name: a base model or an adapter."""
        return self.models.is_base_model(model) or model in self.models.lora_requests

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function that reads files returns; one at a time, so that they are read once."""
        async with self._files:
            return await asyncio.to_thread(function, *args)

    async def resolve_aside(
        self, carriages: Sequence[Carriage] | None, model: str | None, options: Any
    ) -> ResolvedSteering | None:
        """`resolve`, off the event loop where it may read files: vectors have up to 256 MiB."""
        may_be_alias = model is not None and ":" in model and not self.is_served(model)
        if may_be_alias or any(carriage.may_name_files for carriage in carriages or ()):
            found: ResolvedSteering | None = await self.in_thread(
                self.resolve, carriages, model, options
            )
            return found
        return self.resolve(carriages, model, options)

    def resolve(
        self, carriages: Sequence[Carriage] | None, model: str | None, options: Any
    ) -> ResolvedSteering | None:
        """Compile the steering of a request; None if it asks for none.

        carriages: those found in the body. model: the request's model, maybe an alias. options:
        where the request's other fields are found as attributes.

        Raises SteeringError if it cannot be carried out exactly as asked.
        """
        alias = split_alias(model, self.presets, self.is_served, self.any_model)
        if not carriages and alias is None:
            return None
        found = list(carriages or ())
        if alias is not None:
            model, carriage = alias
            found.append(carriage)
        return self._compile(single(found), model, options)

    def _compile(self, carriage: Carriage, model: str | None, options: Any) -> ResolvedSteering:
        spec = carriage.spec()
        try:
            presets = self._methods_of(spec.preset)
            program = compile_spec(spec, self.geometry, presets, carriage.param)
        except SteeringError:
            raise
        except Exception as error:
            raise steering_failure("compile", error) from error
        refuse_unsupported(program, self.vllm_config, carriage.param)
        reason = unsupported_request(self.vllm_config)
        if reason:
            raise SteeringError(Reason.UNSUPPORTED, reason, carriage.param)
        for name in FOREIGN_DECODING:
            if getattr(options, name, False):
                message = "steering together with beam search is not supported"
                raise SteeringError(Reason.UNSUPPORTED, message, name)
        if getattr(options, "background", False):
            message = "a background response cannot show its steering; send it without `background`"
            raise SteeringError(Reason.UNSUPPORTED, message, "background")
        return ResolvedSteering(spec, program, model)

    def _methods_of(self, preset: str | None) -> Presets:
        """Of a preset alone: to look at one may read files. Of all where it is unknown, to tell."""
        if preset is None:
            return {}
        known = self.presets.get(preset)
        named = self.presets if known is None else {preset: known}
        return {name: each.methods for name, each in named.items()}


def steering_state(request: Request) -> SteeringState:
    """The state of the app that serves a request."""
    state: SteeringState = request.app.state.headway
    return state
