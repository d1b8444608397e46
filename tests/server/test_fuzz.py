"""Requests drawn from the server's own OpenAPI document: whatever is sent, nothing is a 5xx.

schemathesis draws what fits the document and what does not. Of the routes that generate, bodies are
drawn in two ways: all fields together, of which most are refused early, and Headway's alone in a
request that is good otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from headway.benchmarks.soak_profiles import put_shared
from headway.benchmarks.soak_specs import MIXES, SPECS
from tests.engine.harness import GEOMETRY
from tests.server.calls import CHAT, COMPLETIONS, PROMPT, RESPONSES, bodies, post
from tests.server.conftest import ADMIN_KEY, MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEERING = "/v1/steering"
GENERATING = (CHAT, COMPLETIONS, RESPONSES)
OWN = (
    ("POST", "/compile"),
    ("GET", "/reports/{request_id}"),
    ("GET", "/profiles/{name}"),
    ("PUT", "/profiles/{name}"),
    ("DELETE", "/profiles/{name}"),
    ("POST", "/profiles/{name}/feedback"),
    ("PUT", "/artifacts/{digest}"),
    ("GET", "/artifacts/{digest}"),
    ("PUT", "/presets/{name}"),
    ("DELETE", "/presets/{name}"),
)
ANYTHING_FITS = (
    *((verb, path) for verb, path in OWN if verb in ("GET", "DELETE")),
    ("PUT", "/artifacts/{digest}"),
)
"""Where all that is sent is a name and bytes: there is nothing that does not fit the document."""
EXAMPLES, SLOW_EXAMPLES = 15, 10
KEEP = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 4, "n": 1}
"""Fields that would make a request run for long, and what they are kept at."""


def drawing(examples: int) -> Callable[..., Any]:
    """Draws so many examples, the same in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    """The document as the server has it."""
    return schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind(server: Server) -> Any:
    """Presets and profiles that were drawn go again; the engine lives and withheld nothing."""
    given_presets = {each["name"] for each in listed(server, "presets")}
    given_profiles = {each["name"] for each in listed(server, "profiles")}
    yield
    for kind, kept in (("presets", given_presets), ("profiles", given_profiles)):
        for each in listed(server, kind):
            if each["name"] not in kept:
                gone = server.http.delete(f"{STEERING}/{kind}/{each['name']}", headers=KEY)
                assert gone.status_code == 200, gone.text
    assert server.http.get("/health").status_code == 200
    assert server.metric("headway_unsteered_total") == 0
    assert post(server, CHAT, bodies()[CHAT])["choices"]


KEY = {"X-Steering-Api-Key": ADMIN_KEY}


def listed(server: Server, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get(f"{STEERING}/{kind}").json()["data"]
    return found


def check(response: Any, sent: str) -> None:
    """No 5xx, and of every refusal a message."""
    assert response.status_code < 500, f"{sent}\n{response.status_code} {response.text}"
    if response.status_code >= 400:
        found = response.json()
        # FastAPI says `detail` where a body is no text.
        assert found.get("detail") or found["error"]["message"], sent


def modes() -> list[Any]:
    return [
        pytest.param(verb, path, mode, id=f"{verb} {path} {mode}")
        for verb, path in OWN
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or (verb, path) not in ANYTHING_FITS
    ]


@pytest.mark.parametrize(("verb", "path", "mode"), modes())
def test_the_routes_of_steering(
    server: Server, document: Any, verb: str, path: str, mode: GenerationMode
) -> None:
    operation = document[f"{STEERING}{path}"][verb]

    @drawing(EXAMPLES)
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        response = case.call(base_url=server.url, headers=KEY, timeout=60)
        check(response, case.as_curl_command())

    send()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", GENERATING)
def test_requests_with_all_fields_drawn(
    server: Server, document: Any, path: str, mode: GenerationMode
) -> None:
    @drawing(SLOW_EXAMPLES)
    @given(document[path]["POST"].as_strategy(generation_mode=mode), st.booleans())
    def send(case: Any, on_good_ones: bool) -> None:
        if isinstance(case.body, dict):
            case.body = kept_short(case.body)
            if on_good_ones:
                # With a prompt and a model that are there, the other fields are looked at.
                case.body = {**case.body, **bodies()[path], **KEEP}
        response = case.call(base_url=server.url, timeout=120)
        check(response, case.as_curl_command())

    send()


def kept_short(body: dict[str, Any]) -> dict[str, Any]:
    """A body with little to generate."""
    kept = dict(body)
    for name, most in KEEP.items():
        # What is no number is refused; what is missing would be all that the model has room for.
        if isinstance(kept.get(name), int | float | None):
            kept[name] = most
    return kept


@st.composite
def good_steering(draw: st.DrawFn) -> Any:
    """A `steering` field that this server takes."""
    names = draw(st.sampled_from([*((name,) for name in SPECS), *MIXES.values()]))
    random = draw(st.randoms(use_true_random=False))
    report = draw(st.sampled_from(["none", "summary", "full"]))
    return {"methods": [SPECS[name](random, GEOMETRY, PROMPT) for name in names], "report": report}


def steering_of(document: Any) -> Any:
    """Strategies for the `steering` field: good ones, and those of bodies of the compile route."""

    def field(case: Any) -> Any:
        found = case.body.get("steering") if isinstance(case.body, dict) else case.body
        return found.decode("latin-1") if isinstance(found, bytes) else found

    operation = document[f"{STEERING}/compile"]["POST"]
    modes = (operation.as_strategy(generation_mode=mode).map(field) for mode in GenerationMode)
    return st.one_of(good_steering(), *modes)


@pytest.mark.parametrize("path", GENERATING)
def test_good_requests_with_steering_drawn(server: Server, document: Any, path: str) -> None:
    for ask in put_shared(GEOMETRY):
        what: dict[str, Any] = {"content": ask.content} if ask.content else {"json": ask.body}
        assert server.http.request(ask.verb, ask.path, headers=KEY, **what).is_success
    outcomes: list[int] = []

    @drawing(EXAMPLES)
    @given(steering_of(document), st.booleans(), st.booleans())
    def send(steering: Any, in_xargs: bool, stream: bool) -> None:
        fields: dict[str, Any] = {"steering": steering}
        if in_xargs:
            fields = {"vllm_xargs": {"steering": json.dumps(steering)}}
        body = {**bodies(**fields)[path], "stream": stream, "model": MODEL}
        body |= {name: value for name, value in KEEP.items() if name in body}
        response = server.http.post(path, json=body)
        check(response, json.dumps(body))
        if response.status_code == 200:
            assert_steered(response, steering)
        outcomes.append(response.status_code)

    send()
    assert set(outcomes) >= {200, 400}


def assert_steered(response: Any, steering: Any) -> None:
    """What was accepted shows what was asked for."""
    if steering is None:
        assert "x-headway-fingerprint" not in response.headers
        return
    assert response.headers["x-headway-fingerprint"]
    assert '"error"' not in response.text.replace('"error":null', "")
