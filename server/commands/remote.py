"""The profiles and artefacts of a running server, over HTTP."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx

from headway.server.http.admin import KEY_HEADER

TIMEOUT = httpx.Timeout(300.0, connect=10.0)
"""Seconds: an upload may be large, and a server that loads it may be busy."""


class RemoteError(Exception):
    """A server that could not be reached, or that refused."""


class Server:
    """A running server's routes for profiles. Every method raises RemoteError.

    url: with or without the `/v1` that clients of the OpenAI API write. api_key: vLLM's, for every
    route; admin_key: for changes.
    """

    def __init__(self, url: str, api_key: str = "", admin_key: str = "") -> None:
        headers = {}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        if admin_key:
            headers[KEY_HEADER] = admin_key
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            # Redirects are not followed: the keys are for this server.
            self.client = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT)
        except httpx.InvalidURL as error:
            raise RemoteError(f"{url} is no address of a server: {error}") from None

    def has_artifact(self, digest: str) -> bool:
        """Whether the server has the file of that SHA-256 (hex)."""
        return self._send("HEAD", _artifact(digest)).is_success

    def put_artifact(self, digest: str, content: bytes) -> None:
        """Upload a file of that SHA-256 (hex)."""
        headers = {"Content-Type": "application/octet-stream"}
        _checked(self._send("PUT", _artifact(digest), content=content, headers=headers))

    def put_profile(self, name: str, body: dict[str, Any]) -> tuple[int, bool]:
        """Make a new version of a profile; returns its number and whether it is new.

        The content of the newest version makes no new one.
        """
        response = _checked(self._send("PUT", _profile(name), json=body))
        answer = _value(response)
        version = answer.get("version") if isinstance(answer, dict) else None
        if not isinstance(version, int):
            raise RemoteError(f"the answer names no version: {json.dumps(answer)[:200]}")
        return version, response.status_code == httpx.codes.CREATED

    def delete_profile(self, reference: str) -> list[str]:
        """Delete a profile, or of `name@version` that version; returns the versions deleted."""
        answer = _value(_checked(self._send("DELETE", _profile(reference))))
        versions = answer.get("deleted") if isinstance(answer, dict) else None
        if not isinstance(versions, list):
            raise RemoteError(f"the answer names no versions: {json.dumps(answer)[:200]}")
        return [str(version) for version in versions]

    def list_profiles(self) -> list[dict[str, Any]]:
        """What the server says of each of its profiles."""
        answer = _value(_checked(self._send("GET", "/v1/steering/profiles")))
        found = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise RemoteError(f"the answer lists no profiles: {json.dumps(answer)[:200]}")
        return found

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self.client.request(method, path, **options)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise RemoteError(f"no answer from {self.url}: {reason}") from None


def _artifact(digest: str) -> str:
    return f"/v1/steering/artifacts/sha256:{digest}"


def _profile(reference: str) -> str:
    return f"/v1/steering/profiles/{quote(reference, safe='@')}"


def _value(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise RemoteError(f"the answer is not JSON: {response.text[:200]!r}") from None


def _checked(response: httpx.Response) -> httpx.Response:
    """The response. Raises RemoteError with the server's own words if it is no success."""
    if response.is_success:
        return response
    try:
        body = response.json()
    except ValueError:
        body = None
    error = body.get("error", body.get("detail")) if isinstance(body, dict) else None
    if isinstance(error, dict):
        notes = [str(error[key]) for key in ("param", "reason") if error.get(key)]
        words = f"{error.get('message')}" + (f" ({', '.join(notes)})" if notes else "")
    else:
        words = str(error or response.reason_phrase)
    raise RemoteError(f"the server answered {response.status_code}: {words}")
