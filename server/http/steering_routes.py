"""The routes under /v1/steering: what this server can do, dry runs, presets, past reports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from headway.server.engine.config import (
    max_sgrs_requests,
    unsupported_attention,
    unsupported_saliency,
)
from headway.server.http import openapi
from headway.server.http.carriage import CARRIAGES
from headway.server.http.clients import current_client
from headway.server.http.dry_run import compile_body, cost_class, describe
from headway.server.http.errors import error_response
from headway.server.http.state import (
    MAX_REPORT_BYTES,
    MAX_REPORTS,
    SteeringState,
    steering_state,
)
from headway.steering import SteeringError
from headway.steering.compile import ENGINE_FEATURES
from headway.steering.methods.base import Method
from headway.steering.program import Feature
from headway.steering.registry import METHODS
from headway.steering.schema import MAX_METHODS
from headway.steering.validation import MAX_SPEC_BYTES

__all__ = ["cost_class", "router"]

router = APIRouter(prefix="/v1/steering")


@router.get("/capabilities")
async def capabilities(raw_request: Request) -> JSONResponse:
    """What can be asked of this server; answering at all is part of being ready."""
    state = steering_state(raw_request)
    geometry = state.geometry
    return JSONResponse(
        {
            "headway": _version("headway"),
            "models": [model.name for model in state.models.base_model_paths],
            "model": {
                "architecture": geometry.architecture,
                "num_layers": geometry.num_layers,
                "num_heads": geometry.num_heads,
                "num_kv_heads": geometry.num_kv_heads,
                "head_size": geometry.head_size,
                "hidden_size": geometry.hidden_size,
                "supports_images": geometry.supports_images,
                "quantized": geometry.quantized,
                "sink_dims": list(geometry.sink_dims),
                "fingerprint": geometry.fingerprint,
            },
            "methods": {name: _method(method) for name, method in METHODS.items()},
            "presets": sorted(state.presets),
            "profiles": list(geometry.profiles.names() if geometry.profiles is not None else ()),
            "registry": {"writable": state.registry is not None and state.registry.is_writable},
            "carriages": list(CARRIAGES),
            "features": sorted(_features(state)),
            "limits": {
                "max_spec_bytes": MAX_SPEC_BYTES,
                "max_methods": MAX_METHODS,
                "slots": state.vllm_config.scheduler_config.max_num_seqs,
                "reports": MAX_REPORTS,
                "sgrs_requests": max_sgrs_requests(state.vllm_config),
                "steered_requests": state.limits.max_steered_requests,
                "steered_per_key": state.limits.max_steered_per_key,
                "sgrs_per_key": state.limits.max_sgrs_per_key,
                "body_bytes": state.limits.body_bytes,
            },
            "engine": _engine(state),
        }
    )


@router.post(
    "/compile",
    dependencies=[Depends(validate_json_request)],
    responses=openapi.COMPILE,
    openapi_extra=openapi.COMPILE_BODY,
)
async def compile_request(body: dict[str, Any], raw_request: Request) -> Response:
    """The program that a request body would get, or the error it would meet; nothing is run.

    body: `{"steering": {...}}`, or a whole request for one of the steerable routes.
    """
    state = steering_state(raw_request)
    try:
        program = await state.in_thread(compile_body, state, body)
    except SteeringError as error:
        return error_response(error)
    return JSONResponse(describe(program))


@router.get("/presets")
async def presets(raw_request: Request) -> JSONResponse:
    """The presets of this server, each also a model alias `<base>:<name>`."""
    state = steering_state(raw_request)
    return JSONResponse({"data": [preset.as_dict() for preset in state.presets.values()]})


@router.get("/reports/{request_id}", responses=openapi.REPORT)
async def report(request_id: str, raw_request: Request) -> Response:
    """What steering did in a finished answer, by its id, for who has the API key that asked."""
    found = steering_state(raw_request).reports.get(request_id, current_client())
    if found is None:
        kept = f"its last {MAX_REPORTS}, {MAX_REPORT_BYTES >> 20} MiB at most"
        raise HTTPException(404, f"no report of {request_id[:80]}; this server keeps {kept}")
    return Response(found, media_type="application/json")


def _method(method: type[Method]) -> dict[str, Any]:
    defaults = {
        name: field.default
        for name, field in method.model_fields.items()
        if not field.is_required()
    }
    return {
        "description": (method.__doc__ or "").strip().split("\n")[0],
        "schema": method.model_json_schema(),
        "defaults": defaults,
    }


def _features(state: SteeringState) -> frozenset[Feature]:
    """What this engine can do, with this model and in this dtype."""
    features = ENGINE_FEATURES
    if unsupported_attention(state.vllm_config):
        features -= {Feature.ATTENTION_EDIT, Feature.READOUT}
    if unsupported_saliency(state.vllm_config):
        features -= {Feature.SAMPLING_GATE}
    return features


def _engine(state: SteeringState) -> dict[str, Any]:
    from vllm import __version__ as vllm_version
    from vllm.platforms import current_platform

    config = state.vllm_config
    backend = config.attention_config.backend
    return {
        "vllm": vllm_version,
        "device": current_platform.device_type,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "mode": "eager" if config.model_config.enforce_eager else "compiled",
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "block_size": config.cache_config.block_size,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "speculative_decoding": config.speculative_config is not None,
        "attention_backend": backend.name if backend is not None else "auto",
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
