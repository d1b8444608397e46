"""Profiles put over HTTP: served at once, versioned, loaded into the workers, kept while in use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headway.steering import ModelGeometry
from headway.steering.vectors import VectorProfile
from tests.engine.harness import GEOMETRY
from tests.server.calls import CHAT, COMPLETIONS, PROMPT, chat_body, events, post, text_of, wait_for
from tests.server.conftest import ADMIN_KEY, MODEL, Server
from tests.vectors import drawn_profile

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KEY = {"X-Steering-Api-Key": ADMIN_KEY}
PROFILES = "/v1/steering/profiles"
LAYERS = tuple(range(30))


def put(server: Server, folder: Path, name: str, profile: VectorProfile) -> str:
    """Upload a profile; returns the version that was made of it."""
    path = folder / "profile.safetensors"
    digest = profile.save(path)
    uploaded = server.http.put(
        f"/v1/steering/artifacts/sha256:{digest}", content=path.read_bytes(), headers=KEY
    )
    assert uploaded.status_code in (200, 201), uploaded.text
    body = {"artifact": f"sha256:{digest}", "description": "Drawn."}
    made = server.http.put(f"{PROFILES}/{name}", json=body, headers=KEY)
    assert made.status_code in (200, 201), made.text
    return str(made.json()["reference"])


def drawn(seed: int, kind: str = "gact") -> VectorProfile:
    return drawn_profile(GEOMETRY, kind, LAYERS, num_clusters=4, seed=seed)


def steered(profile: str, strength: float = 1.5, **fields: Any) -> dict[str, Any]:
    method = {"method": "gact", "profile": profile, "strength": strength}
    return chat_body(steering={"methods": [method]}, **fields)


@pytest.fixture(scope="module")
def colour(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A profile of the registry with two versions."""
    folder = tmp_path_factory.mktemp("profiles")
    assert put(server, folder, "colour", drawn(1)) == "colour@1"
    assert put(server, folder, "colour", drawn(2)) == "colour@2"
    assert put(server, folder, "colour", drawn(2)) == "colour@2"
    yield "colour"
    server.http.delete(f"{PROFILES}/colour", headers=KEY)


def test_an_answer_shows_which_version_steered_it(server: Server, colour: str) -> None:
    plain = text_of(post(server, CHAT, chat_body()))
    newest = post(server, CHAT, steered(colour))
    first = post(server, CHAT, steered("colour@1"))
    [method] = newest["steering"]["methods"]
    assert method["profile"] == "colour@2" and method["layers"] == list(LAYERS)
    assert method["positions_edited"] == newest["usage"]["completion_tokens"]
    assert first["steering"]["methods"][0]["profile"] == "colour@1"
    assert len({plain, text_of(newest), text_of(first)}) == 3
    assert first["steering"]["fingerprint"] != newest["steering"]["fingerprint"]
    again = post(server, CHAT, steered("colour@2"))
    assert text_of(again) == text_of(newest)
    assert again["steering"]["fingerprint"] == newest["steering"]["fingerprint"]
    by_digest = post(server, CHAT, steered(method["digest"]))
    assert text_of(by_digest) == text_of(newest)
    assert server.metric("headway_profile_info", name="colour", version="2") == 1
    assert server.metric("headway_unsteered_total") == 0


def test_a_strength_of_zero_is_the_unsteered_answer(server: Server, colour: str) -> None:
    answer = post(server, CHAT, steered(colour, strength=0.0))
    assert text_of(answer) == text_of(post(server, CHAT, chat_body()))
    assert answer["steering"]["methods"][0]["positions_edited"] == 0


def test_streams_and_several_sequences(server: Server, colour: str) -> None:
    last = [event for event in events(server, CHAT, steered(colour)) if "steering" in event]
    assert len(last) == 1 and "colour@2" in last[0]
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "top_k": 1, "n": 2}
    answer = post(server, COMPLETIONS, {**body, "steering": steered(colour)["steering"]})
    assert answer["choices"][0]["text"] == answer["choices"][1]["text"]
    assert answer["steering"]["sequences"] == 2


def test_heads_shifted_by_a_profile(server: Server, tmp_path: Path) -> None:
    put(server, tmp_path, "shifts", drawn_profile(GEOMETRY, "act", (3, 9), seed=5))
    method = {"method": "act", "profile": "shifts", "strength": 8.0}
    answer = post(server, CHAT, chat_body(steering={"methods": [method]}))
    assert text_of(answer) != text_of(post(server, CHAT, chat_body()))
    [shown] = answer["steering"]["methods"]
    assert shown["profile"] == "shifts@1"
    assert shown["heads"] == [[3, 0], [3, 1], [9, 0], [9, 1]]
    assert server.http.delete(f"{PROFILES}/shifts", headers=KEY).status_code == 200


def test_a_preset_put_over_http_is_a_model(server: Server, colour: str) -> None:
    methods = steered(colour)["steering"]["methods"]
    made = server.http.put("/v1/steering/presets/colourful", json={"methods": methods}, headers=KEY)
    assert made.status_code in (200, 201), made.text
    alias = f"{MODEL}:colourful"
    assert alias in {card["id"] for card in server.http.get("/v1/models").json()["data"]}
    assert text_of(post(server, CHAT, chat_body(model=alias))) == text_of(
        post(server, CHAT, steered(colour))
    )
    refused = server.http.delete(f"{PROFILES}/{colour}", headers=KEY)
    assert refused.status_code == 409 and "colourful" in refused.json()["error"]["message"]
    assert server.http.delete("/v1/steering/presets/colourful", headers=KEY).status_code == 200
    assert alias not in {card["id"] for card in server.http.get("/v1/models").json()["data"]}


def test_changes_need_the_admin_key(server: Server, colour: str) -> None:
    for headers in ({}, {"X-Steering-Api-Key": "wrong"}):
        response = server.http.delete(f"{PROFILES}/{colour}", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["reason"] == "E_UNAUTHORIZED"
    assert server.http.get(f"{PROFILES}/{colour}").status_code == 200


def test_a_profile_of_another_model_is_refused(server: Server, tmp_path: Path) -> None:
    other = ModelGeometry(29, 9, 3, 64, 576, architecture="LlamaForCausalLM")
    path = tmp_path / "other.safetensors"
    digest = drawn_profile(other).save(path)
    response = server.http.put(
        f"/v1/steering/artifacts/sha256:{digest}", content=path.read_bytes(), headers=KEY
    )
    assert response.status_code == 400
    assert response.json()["error"]["reason"] == "E_PROFILE_MISMATCH"


def test_a_profile_in_use_cannot_be_deleted(server: Server, tmp_path: Path) -> None:
    put(server, tmp_path, "busy", drawn(7))
    body = steered("busy", max_tokens=400, ignore_eos=True, stream=True)
    with server.http.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()  # kept: its end would be that of the stream
        assert "error" not in next(lines)
        refused = httpx.delete(f"{server.url}{PROFILES}/busy", headers=KEY)
        assert refused.status_code == 409, refused.text
        assert refused.json()["error"]["reason"] == "E_IN_USE"
    assert wait_for(lambda: server.metric("headway_active_requests") == 0)
    assert server.http.delete(f"{PROFILES}/busy", headers=KEY).status_code == 200
    gone = server.http.post(CHAT, json=steered("busy"))
    assert gone.status_code == 404
    assert gone.json()["error"]["reason"] == "E_PROFILE_NOT_FOUND"


async def test_vectors_share_a_memory_that_running_requests_can_fill(
    server: Server, tmp_path: Path
) -> None:
    """1 MiB holds one profile of 30 layers x 4 clusters, 0.53 MiB, and no second one."""
    for seed in (11, 12):
        put(server, tmp_path, f"large{seed}", drawn(seed))
    long = {"max_tokens": 200, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        first = asyncio.create_task(client.post(CHAT, json=steered("large11", **long)))
        await asyncio.sleep(1.0)
        full = await client.post(CHAT, json=steered("large12"))
        assert full.status_code == 429, full.text
        assert full.json()["error"]["reason"] == "E_CAPACITY"
        assert full.headers["retry-after"] == "1"
        shared = await client.post(CHAT, json=steered("large11"))
        assert shared.status_code == 200
        assert (await first).status_code == 200
        # It is free now: the vectors of the first make room.
        later = await client.post(CHAT, json=steered("large12"))
        assert later.status_code == 200, later.text
    assert text_of(later.json()) == text_of(post(server, CHAT, steered("large12")))
    for seed in (11, 12):
        assert wait_for(lambda: server.metric("headway_active_requests") == 0)
        gone = server.http.delete(f"{PROFILES}/large{seed}", headers=KEY)
        assert gone.status_code == 200, gone.text
