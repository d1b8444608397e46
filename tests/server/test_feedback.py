"""Feedback on answers of a real server: read in the workers, refined to versions, served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from headway.steering.vectors import FeedbackRule, VectorProfile
from tests.engine.harness import GEOMETRY
from tests.server.calls import CHAT, COMPLETIONS, PROMPT, RESPONSES, bodies, events, post, text_of
from tests.server.conftest import MODEL, Server
from tests.server.test_registry import KEY, PROFILES, put
from tests.vectors import drawn_profile

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = (6, 14, 22)
NAME = "taught"


def unsure(rule: FeedbackRule) -> VectorProfile:
    """A drawn profile with logits of about 1."""
    drawn = drawn_profile(GEOMETRY, layers=LAYERS, feedback=rule)
    weights = drawn.tensors["probe_weights"] / np.float32(GEOMETRY.hidden_size**0.5)
    return VectorProfile(drawn.header, {**drawn.tensors, "probe_weights": weights})


def body_of(path: str, reference: str = NAME, **fields: Any) -> dict[str, Any]:
    methods = [{"method": "gact", "profile": reference, "strength": 2.0}]
    return bodies(steering={"methods": methods}, **fields)[path]


def give(server: Server, request_id: str, **verdict: Any) -> httpx.Response:
    body = {"request_id": request_id, **verdict}
    return server.http.post(f"{PROFILES}/{NAME}/feedback", json=body, headers=KEY)


def test_feedback_makes_versions_that_are_served(server: Server, tmp_path: Path) -> None:
    rule = FeedbackRule(batch=4, learning_rate=10.0)
    assert put(server, tmp_path, NAME, unsure(rule))
    answers = [post(server, path, body_of(path)) for path in (CHAT, COMPLETIONS, RESPONSES)]
    picked = [answer["steering"]["methods"][0]["clusters"] for answer in answers]
    assert all(list(each) == [str(layer) for layer in LAYERS] for each in picked)
    wanted = (picked[0][str(LAYERS[0])] + 1) % 3

    lines = events(server, CHAT, body_of(CHAT, stream=True))
    streamed = [json.loads(line) for line in lines if line != "[DONE]"]
    [echo] = [each["steering"] for each in streamed if "steering" in each]
    assert echo["methods"][0]["clusters"] == picked[0]
    ids = [answer["id"] for answer in answers] + [streamed[0]["id"]]
    for pending, request_id in enumerate(ids[:3], start=1):
        counts = {"profile": NAME, "pending": pending, "batch": 4, "version": None}
        assert give(server, request_id, label=wanted).json() == counts
    assert give(server, ids[0], label=wanted).status_code == 409
    made = give(server, ids[3], label=wanted)
    assert made.status_code == 200 and made.json()["version"] == f"{NAME}@2", made.text

    newest = post(server, CHAT, body_of(CHAT))
    [method] = newest["steering"]["methods"]
    assert method["profile"] == f"{NAME}@2"
    assert set(method["clusters"].values()) == {wanted}
    first = post(server, CHAT, body_of(CHAT, f"{NAME}@1"))
    assert text_of(first) == text_of(answers[0])
    assert first["steering"] == answers[0]["steering"]
    server.http.delete(f"{PROFILES}/{NAME}", headers=KEY)


def test_feedback_is_on_one_prompt(server: Server, tmp_path: Path) -> None:
    rule = FeedbackRule(batch=9)
    assert put(server, tmp_path, NAME, unsure(rule))
    several = {**body_of(COMPLETIONS), "model": MODEL, "prompt": [PROMPT, "Two"]}
    answer = post(server, COMPLETIONS, several)
    assert "clusters" not in answer["steering"]["methods"][0]
    refused = give(server, answer["id"], preferred=True)
    assert refused.status_code == 400 and "nothing is kept" in refused.text
    drawn = post(server, CHAT, body_of(CHAT, n=2, temperature=1.0, seed=1))
    assert len(drawn["steering"]["methods"][0]["clusters"]) == len(LAYERS)
    assert give(server, drawn["id"], preferred=False).json()["pending"] == 1
    server.http.delete(f"{PROFILES}/{NAME}", headers=KEY)
