"""What clients get wrong in `headway bench soak`, and what each must be told."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from headway.benchmarks.soak_asks import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    STEERING_ROUTES,
    Ask,
    Expected,
    Place,
)
from headway.benchmarks.soak_bodies import body
from headway.benchmarks.soak_profiles import PROFILES, artifact
from headway.steering import Reason
from headway.steering.errors import HTTP_STATUS
from headway.steering.schema import MAX_METHODS
from headway.steering.validation import MAX_SPEC_BYTES

FIRST = "steering.methods[0]"
PROMPT = "Say something about the sea."
HEADS = {"method": "vhr", "heads": [[0, 0]]}
NOT_DRIVEN = {
    Reason.NO_SINK_DIMS: "a text model is refused for its lack of images first",
    Reason.PROMPT_TOO_LONG: "needs heads that are chosen by an image",
    Reason.ALREADY_GIVEN: "needs feedback on one answer twice; tests/server/test_feedback.py",
    Reason.FORBIDDEN: "the server has an admin key",
    Reason.QUANTIZED: "the model is not quantised",
    Reason.TIMEOUT: "takes as long as the server waits; tests/server/test_security.py",
    Reason.CAPACITY: "the soak stays below every limit; one that it hits is a finding",
    Reason.STEERING_FAILED: "no client can cause it",
    Reason.UNAVAILABLE: "the server is not ending",
}
"""Reasons that no row below has, and why."""


def refusals(place: Place, kind: str) -> list[Ask]:
    """Every bad request, for one of the routes each."""
    return [*_steering(place, kind), *_admin(place, kind), *_vllm(place, kind)]


def _steering(place: Place, kind: str) -> Iterator[Ask]:
    """Steering that is refused: as a field of a request, or on a route that cannot steer."""
    layers, heads = place.geometry.num_layers, place.geometry.num_heads
    rows: list[tuple[dict[str, Any], Reason, str]] = [
        (_methods({"method": "magic"}), Reason.UNKNOWN_METHOD, f"{FIRST}.method"),
        (_methods({"method": 3}), Reason.BAD_PARAM, FIRST),
        (_methods(HEADS | {"alpha": -0.5}), Reason.BAD_PARAM, f"{FIRST}.alpha"),
        (_methods(HEADS | {"alpha": "2"}), Reason.BAD_PARAM, f"{FIRST}.alpha"),
        (_methods(HEADS | {"beta": 1}), Reason.BAD_PARAM, f"{FIRST}.beta"),
        (_methods(HEADS | {"heads": []}), Reason.BAD_PARAM, f"{FIRST}.heads"),
        (_methods(HEADS | {"heads": [[0, 0, 0]]}), Reason.BAD_PARAM, f"{FIRST}.heads[0]"),
        (
            _methods(HEADS | {"heads": [[layers, 0]]}),
            Reason.LAYER_RANGE,
            f"{FIRST}.heads[0][0]",
        ),
        (_methods(HEADS | {"heads": [[0, heads]]}), Reason.HEAD_RANGE, f"{FIRST}.heads[0][1]"),
        (_methods(*[HEADS] * (MAX_METHODS + 1)), Reason.BAD_PARAM, "steering.methods"),
        (_methods(), Reason.BAD_PARAM, "steering.methods"),
        ({"steering": 3}, Reason.BAD_PARAM, "steering"),
        ({"steering": {"methods": [HEADS], "mode": 1}}, Reason.BAD_PARAM, "steering.mode"),
        ({"steering": {"preset": "soak-none"}}, Reason.PRESET_NOT_FOUND, "steering.preset"),
        (
            _methods({"method": "gact", "profile": "soak-none"}),
            Reason.PROFILE_NOT_FOUND,
            f"{FIRST}.profile",
        ),
        (
            _methods({"method": "gact", "profile": PROFILES["caa"]}),
            Reason.BAD_PARAM,
            f"{FIRST}.profile",
        ),
        (
            {"steering": {"methods": [HEADS], "note": "x" * MAX_SPEC_BYTES}},
            Reason.TOO_LARGE,
            "steering",
        ),
        ({"vllm_xargs": {"steering": "{"}}, Reason.BAD_PARAM, "vllm_xargs.steering"),
        (
            {"steering": {"preset": "a"}, "vllm_xargs": {"steering": '{"preset": "a"}'}},
            Reason.CONFLICT,
            "steering",
        ),
        (
            _methods({"method": "emphasis", "spans": [{"text": "zebra"}]}),
            Reason.BAD_PARAM,
            f"{FIRST}.spans[0].text",
        ),
        (
            _methods({"method": "locore"}, {"method": "locore", "window": 3}),
            Reason.CONFLICT,
            "steering.methods[1]",
        ),
    ]
    if place.methods >= {"sgrs", "gact"}:
        both = {"method": "sgrs"}, {"method": "gact", "profile": PROFILES["gact"]}
        rows.append((_methods(*both), Reason.UNSUPPORTED, "steering"))
    if not place.geometry.supports_images:
        rows.append((_methods({"method": "vhr"}), Reason.NO_IMAGE, FIRST))
        rows.append((_methods({"method": "var", "sink_dims": [0]}), Reason.NO_IMAGE, FIRST))
    for index, (fields, reason, param) in enumerate(rows):
        path = (CHAT, COMPLETIONS, RESPONSES)[index % 3]
        yield _refusal(kind, path, _body(place, path) | fields, reason, param)
    background = _body(place, RESPONSES) | _methods(HEADS) | {"background": True, "store": True}
    yield _refusal(kind, RESPONSES, background, Reason.UNSUPPORTED, "background")
    beam = _body(place, CHAT) | _methods(HEADS) | {"use_beam_search": True, "n": 2}
    yield _refusal(kind, CHAT, beam, Reason.UNSUPPORTED, "use_beam_search")
    elsewhere = {"model": place.model, "prompt": PROMPT, "steering": {"methods": [HEADS]}}
    yield _refusal(kind, "/tokenize", elsewhere, Reason.UNSUPPORTED, "steering")
    # Found when the prompt is rendered, and before the stream begins.
    beyond = _methods({"method": "emphasis", "spans": [{"tokens": [0, 900]}]})
    where = f"{FIRST}.spans[0].tokens[1]"
    stream = _body(place, CHAT) | beyond | {"stream": True}
    yield _refusal(kind, CHAT, stream, Reason.BAD_PARAM, where)


def _admin(place: Place, kind: str) -> Iterator[Ask]:
    """What is refused on the routes of the registry."""
    preset = f"{STEERING_ROUTES}/presets/soak-none"
    profile = f"{STEERING_ROUTES}/profiles/soak-none"
    good = {"methods": [HEADS]}
    used = f"{STEERING_ROUTES}/profiles/{PROFILES['gact']}"
    unknown = {"request_id": "soak-none", "label": 0}

    def admin(verb: str, path: str, reason: Reason, param: str, **what: Any) -> Ask:
        return Ask(kind, path, verb=verb, admin=True, expected=_expected(reason, param), **what)

    keyless = admin("PUT", preset, Reason.UNAUTHORIZED, "X-Steering-Api-Key", body=good)
    yield replace(keyless, admin=False)
    yield admin("DELETE", preset, Reason.PRESET_NOT_FOUND, "name")
    yield admin("DELETE", profile, Reason.PROFILE_NOT_FOUND, "name")
    yield admin("DELETE", used, Reason.IN_USE, "name")  # by a preset
    bad_name = f"{STEERING_ROUTES}/presets/-soak"
    yield admin("PUT", bad_name, Reason.BAD_PARAM, "name", body=good)
    bad_method = {"methods": [{"method": "magic"}]}
    where = "preset.methods[0].method"
    yield admin("PUT", preset, Reason.UNKNOWN_METHOD, where, body=bad_method)
    yield admin("POST", f"{used}/feedback", Reason.REQUEST_NOT_FOUND, "feedback.request_id",
                body=unknown)  # fmt: skip
    digest, content = artifact(place.geometry, "gact", 0)
    other = f"{STEERING_ROUTES}/artifacts/sha256:{digest[::-1]}"
    yield admin("PUT", other, Reason.BAD_PARAM, "artifact", content=content)
    larger = replace(place.geometry, num_layers=place.geometry.num_layers + 1)
    digest, content = artifact(larger, "gact", 0)
    other = f"{STEERING_ROUTES}/artifacts/sha256:{digest}"
    yield admin("PUT", other, Reason.PROFILE_MISMATCH, "artifact", content=content)
    yield _refusal(
        kind, f"{STEERING_ROUTES}/compile", _body(place, CHAT), Reason.BAD_PARAM, "steering"
    )


def _vllm(place: Place, kind: str) -> Iterator[Ask]:
    """What vLLM refuses, steered or not."""
    chat = _body(place, CHAT)
    rows: list[tuple[dict[str, Any], int]] = [
        (chat | {"temperature": -1}, 400),
        (chat | {"messages": "none"}, 400),
        (chat | {"model": "soak-none"}, 404),
        (chat | {"model": f"{place.model}:soak-none"}, 404),
        (chat | {"model": "soak-none", **_methods(HEADS)}, 404),
        (chat | {"top_p": 2.0, **_methods(HEADS)}, 400),
    ]
    for asked, status in rows:
        yield Ask(kind, CHAT, asked, expected=Expected((status,)))
    yield Ask(kind, CHAT, content=b'{"model": ', expected=Expected((400,)))
    report = f"{STEERING_ROUTES}/reports/soak-none"
    yield Ask(kind, report, verb="GET", expected=Expected((404,)))


def _methods(*methods: Any) -> dict[str, Any]:
    return {"steering": {"methods": list(methods)}}


def _body(place: Place, path: str) -> dict[str, Any]:
    return body(place, random.Random(0), path, PROMPT, tokens=4)


def _refusal(kind: str, path: str, body: dict[str, Any], reason: Reason, param: str) -> Ask:
    return Ask(kind, path, body, expected=_expected(reason, param))


def _expected(reason: Reason, param: str) -> Expected:
    return Expected((HTTP_STATUS.get(reason, 400),), str(reason), param)
