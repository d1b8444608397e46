"""The routes under /v1/steering, and the metrics."""

from __future__ import annotations

import pytest

from tests.server.calls import CHAT, IDENTITY, LOUD, QUIET, SCALED, chat_body, post, wait_for
from tests.server.conftest import MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_metrics_count_what_was_served(server: Server) -> None:
    names = dict(method="head_scale", outcome="ok")
    served = server.metric("headway_requests_total", **names)
    phases = [
        server.metric("headway_tokens_total", method="head_scale", phase=phase)
        for phase in ("prompt", "output")
    ]
    refused = server.metric("headway_refused_total", reason="E_UNKNOWN_METHOD")
    answer = post(server, CHAT, chat_body(steering={"methods": SCALED}))
    server.http.post(CHAT, json=chat_body(steering={"methods": [{"method": "x"}]}))
    assert server.metric("headway_requests_total", **names) == served + 1
    usage = answer["usage"]
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    for phase, before, count in zip(("prompt", "output"), phases, counts, strict=True):
        now = server.metric("headway_tokens_total", method="head_scale", phase=phase)
        assert now == before + count
    assert server.metric("headway_refused_total", reason="E_UNKNOWN_METHOD") == refused + 1
    assert server.metric("headway_active_requests") == 0
    assert wait_for(lambda: server.metric("headway_slots", state="free") == 32)
    assert wait_for(lambda: server.metric("headway_step_seconds_count") > 0)
    assert server.metric("headway_failures_total", stage="edit") == 0


def test_capabilities(server: Server) -> None:
    shown = server.http.get("/v1/steering/capabilities").json()
    assert shown["model"]["num_layers"] == 30
    assert shown["model"]["num_heads"] == 9
    assert shown["limits"] == {
        "max_spec_bytes": 65536,
        "max_methods": 16,
        "slots": 32,
        "reports": 1024,
        "sgrs_requests": 8,
        "steered_requests": None,
        "steered_per_key": None,
        "sgrs_per_key": None,
        "body_bytes": 64 * 2**20,
    }
    assert shown["presets"] == ["loud", "quiet"]
    assert shown["methods"]["vhr"]["defaults"]["alpha"] == 2.0
    assert shown["methods"]["vhr"]["schema"]["properties"]["heads"]
    assert shown["engine"]["dtype"] == "float32"
    assert shown["engine"]["mode"] == "eager"


def test_compile_tells_what_a_request_would_get(server: Server) -> None:
    served = post(server, CHAT, chat_body(steering={"methods": LOUD}))["steering"]
    for body in ({"steering": {"methods": LOUD}}, chat_body(model=f"{MODEL}:loud")):
        shown = post(server, "/v1/steering/compile", body)
        assert shown["fingerprint"] == served["fingerprint"]
        counted = [{**method, "positions_edited": 0} for method in shown["methods"]]
        assert counted == [{**method, "positions_edited": 0} for method in served["methods"]]
        assert (shown["cost_class"], shown["identity"]) == ("affine", False)
    nothing = post(server, "/v1/steering/compile", {"steering": {"methods": IDENTITY}})
    assert (nothing["cost_class"], nothing["identity"]) == ("none", True)
    refused = server.http.post("/v1/steering/compile", json=chat_body())
    assert refused.json()["error"]["reason"] == "E_BAD_PARAM"


def test_presets_are_shown(server: Server) -> None:
    shown = {item["name"]: item for item in server.http.get("/v1/steering/presets").json()["data"]}
    assert shown["quiet"]["methods"] == QUIET
    assert shown["quiet"]["description"] == "Two heads switched off."
    assert shown["loud"]["description"] is None


def test_an_unknown_report_is_404(server: Server) -> None:
    response = server.http.get("/v1/steering/reports/chatcmpl-none")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == 404
