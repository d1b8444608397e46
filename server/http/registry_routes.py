"""The routes over the registry: profiles, artefacts, and changes of presets.

Whoever may use the server may look; changes need an admin key (`headway.server.http.admin`).
Everything that touches the disk runs in threads, so that it holds up no stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect

from headway.server.http import metrics, openapi
from headway.server.http.admin import require_admin
from headway.server.http.state import steering_state
from headway.server.registry.files import Upload, check_size
from headway.server.registry.listing import list_profiles, show_profile
from headway.server.registry.names import DIGEST_PREFIX, check_digest, check_name
from headway.server.registry.registry import Registry
from headway.steering import Reason, SteeringError
from headway.steering.profiles import MAX_PROFILE_BYTES
from headway.steering.vectors import MAX_VECTORS_BYTES

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/steering")
ADMIN = [Depends(require_admin)]

WRITE_BYTES = 1024 * 1024
"""How much of an upload is collected before it goes to the disk."""

Result = TypeVar("Result")


@router.get("/profiles")
async def get_profiles(raw_request: Request) -> JSONResponse:
    """The newest version of every profile, also of those of other models."""
    return JSONResponse({"data": await in_thread(list_profiles, registry(raw_request))})


@router.get("/profiles/{name}", responses=openapi.LOOK)
async def get_profile(name: str, raw_request: Request) -> JSONResponse:
    """A profile, by name or `name@version`: its versions, and what it says about itself."""
    return JSONResponse(await in_thread(show_profile, registry(raw_request), name))


@router.put(
    "/profiles/{name}",
    dependencies=ADMIN,
    responses=openapi.UPLOAD,
    openapi_extra=openapi.PROFILE_BODY,
)
async def put_profile(name: str, raw_request: Request) -> JSONResponse:
    """Make the next version of a profile.

    body: `{"artifact": "sha256:..."}` or `{"profile": {...}}`, and maybe a `description`. 201 for
    a new version, 200 where the newest one has this content already.
    """
    held = registry(raw_request)
    check_name(name, "name")
    value = await read_json_body(raw_request, "profile")
    record, is_new = await in_thread(held.put_profile, name, value)
    shown = await in_thread(show_profile, held, record.reference)
    return JSONResponse(shown, _created(is_new))


@router.delete("/profiles/{name}", dependencies=ADMIN, responses=openapi.DELETE)
async def delete_profile(name: str, raw_request: Request) -> JSONResponse:
    """Remove a profile, or of `name@version` that version, with artefacts nothing else names."""
    versions, artifacts = await in_thread(registry(raw_request).delete_profile, name)
    return JSONResponse({"deleted": list(versions), "artifacts_deleted": list(artifacts)})


@router.put(
    "/artifacts/{digest}",
    dependencies=ADMIN,
    responses=openapi.UPLOAD,
    openapi_extra=openapi.ARTIFACT_BODY,
)
async def put_artifact(digest: str, raw_request: Request) -> JSONResponse:
    """Keep the bytes of the body, a vector profile, under their digest `sha256:...`."""
    held = registry(raw_request)
    wanted = check_digest(digest, "digest")
    check_declared(raw_request, MAX_VECTORS_BYTES, "artifact")
    upload = await in_thread(held.store.upload)
    try:
        await receive(raw_request, upload)
        put = held.store.put_artifact
        is_new = await in_thread(put, wanted, upload, held.geometry)
    finally:
        upload.discard()
    return JSONResponse({"digest": digest, "bytes": upload.size}, _created(is_new))


@router.head("/artifacts/{digest}", include_in_schema=False)
@router.get("/artifacts/{digest}", responses=openapi.ARTIFACT)
async def get_artifact(digest: str, raw_request: Request) -> Response:
    """The bytes of an artefact. They never change, as the ETag tells."""
    wanted = check_digest(digest, "digest")
    path: Path | None = await in_thread(registry(raw_request).store.artifact, wanted)
    if path is None:
        message = f"the registry has no artefact {digest}"
        raise SteeringError(Reason.PROFILE_NOT_FOUND, message, "digest")
    headers = {"ETag": f'"{DIGEST_PREFIX}{wanted}"'}
    if headers["ETag"] in raw_request.headers.get("If-None-Match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


@router.put(
    "/presets/{name}",
    dependencies=ADMIN,
    responses=openapi.PRESET,
    openapi_extra=openapi.PRESET_BODY,
)
async def put_preset(name: str, raw_request: Request) -> JSONResponse:
    """Create or replace a preset, which is also the model alias `<base>:<name>`.

    body: as the files of `--steering-preset`. 201 for a new one, 200 for one that was replaced.
    """
    held = registry(raw_request)
    check_name(name, "name")
    value = await read_json_body(raw_request, "preset")
    preset, is_new = await in_thread(held.put_preset, name, value)
    return JSONResponse(preset.as_dict(), _created(is_new))


@router.delete("/presets/{name}", dependencies=ADMIN, responses=openapi.DELETE)
async def delete_preset(name: str, raw_request: Request) -> JSONResponse:
    """Remove a preset."""
    await in_thread(registry(raw_request).delete_preset, name)
    return JSONResponse({"deleted": name})


def registry(raw_request: Request) -> Registry:
    """The registry of the app that serves a request."""
    held = steering_state(raw_request).registry
    assert held is not None, "a server has a registry"
    return held


async def in_thread(function: Callable[..., Result], *args: Any) -> Result:
    """What the function returns. Raises SteeringError(E_STEERING_FAILED) where the disk fails."""
    try:
        return await asyncio.to_thread(function, *args)
    except OSError as error:
        logger.exception("the registry failed on disk")
        metrics.FAILURES.labels(stage="registry").inc()
        message = f"the registry failed on disk: {error.strerror}"
        raise SteeringError(Reason.STEERING_FAILED, message, "registry") from None


def check_declared(raw_request: Request, max_bytes: int, param: str) -> None:
    """Raise SteeringError(E_TOO_LARGE) if the length that is announced is too much already."""
    declared = raw_request.headers.get("Content-Length", "")
    if declared.isdecimal():
        check_size(int(declared), max_bytes, param)


async def receive(raw_request: Request, upload: Upload) -> None:
    """Write the body to an upload, in threads. Raises SteeringError as `Upload.write` does."""
    waiting = bytearray()
    async for chunk in chunks(raw_request, "artifact"):
        waiting += chunk
        if len(waiting) >= WRITE_BYTES:
            await in_thread(upload.write, bytes(waiting))
            waiting.clear()
    await in_thread(upload.write, bytes(waiting))


async def read_json_body(raw_request: Request, param: str) -> Any:
    """The JSON of the body. Raises SteeringError: E_TOO_LARGE, E_BAD_PARAM."""
    check_declared(raw_request, MAX_PROFILE_BYTES, param)
    body = bytearray()
    async for chunk in chunks(raw_request, param):
        body += chunk
        check_size(len(body), MAX_PROFILE_BYTES, param)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise SteeringError(Reason.BAD_PARAM, f"the body is no JSON: {error}", param) from None


async def chunks(raw_request: Request, param: str) -> AsyncIterator[bytes]:
    """The body. Raises SteeringError(E_BAD_PARAM), for the log, if the client goes away."""
    try:
        async for chunk in raw_request.stream():
            yield chunk
    except ClientDisconnect:
        message = "the client went away before the end of the body"
        raise SteeringError(Reason.BAD_PARAM, message, param) from None


def _created(is_new: bool) -> HTTPStatus:
    return HTTPStatus.CREATED if is_new else HTTPStatus.OK
