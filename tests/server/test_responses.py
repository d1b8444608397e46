"""Stored responses: they show their steering later too, and go on with or without it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.server.calls import QUIET, RESPONSES, SCALED, bodies, events, post, text_of
from tests.server.conftest import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def body(**fields: Any) -> dict[str, Any]:
    return bodies(store=True, **fields)[RESPONSES]


def stored(server: Server, response_id: str) -> dict[str, Any]:
    response = server.http.get(f"{RESPONSES}/{response_id}")
    assert response.status_code == 200, response.text
    kept: dict[str, Any] = response.json()
    return kept


def test_a_stored_response_keeps_its_steering(server: Server) -> None:
    answer = post(server, RESPONSES, body(steering={"methods": QUIET}))
    assert stored(server, answer["id"])["steering"] == answer["steering"]


def test_a_streamed_response_is_stored_with_its_steering(server: Server) -> None:
    data = [
        json.loads(item) for item in events(server, RESPONSES, body(steering={"methods": QUIET}))
    ]
    answer = data[-1]["response"]
    assert stored(server, answer["id"])["steering"] == answer["steering"]


def test_a_conversation_may_change_its_steering(server: Server) -> None:
    first = post(server, RESPONSES, body(steering={"methods": QUIET}))
    ask = {"input": "Describe the village.", "previous_response_id": first["id"]}
    ask["max_output_tokens"] = 32
    steered = post(server, RESPONSES, body(steering={"methods": SCALED}, **ask))
    unsteered = post(server, RESPONSES, body(**ask))
    assert steered["steering"]["methods"][0]["method"] == "head_scale"
    assert "steering" not in unsteered
    assert text_of(steered) != text_of(unsteered)


def test_an_unsteered_background_response_runs_as_ever(server: Server) -> None:
    queued = post(server, RESPONSES, body(background=True))
    assert queued["status"] == "queued"
    deadline = time.monotonic() + 30
    while (kept := stored(server, queued["id"]))["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "steering" not in kept


def test_cancel_is_vllms_own(server: Server) -> None:
    queued = post(server, RESPONSES, body(background=True, max_output_tokens=900))
    cancelled = server.http.post(f"{RESPONSES}/{queued['id']}/cancel")
    assert cancelled.status_code == 200, cancelled.text
    assert cancelled.json()["status"] == "cancelled"
