"""Everything a steered request can get wrong: status, reason, JSON path, message."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.calls import CHAT, COMPLETIONS, PROMPT, QUIET, RESPONSES, bodies, chat_body
from tests.server.conftest import MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def methods(*items: Any) -> dict[str, Any]:
    return {"steering": {"methods": list(items)}}


def vhr(**options: Any) -> dict[str, Any]:
    return methods({"method": "vhr", "heads": [[0, 0]], **options})


FIRST = "steering.methods[0]"
ROWS: dict[str, tuple[dict[str, Any], int, str, str, str]] = {
    "unknown method": (
        methods({"method": "magic"}), 400, "E_UNKNOWN_METHOD", f"{FIRST}.method", "vhr"),
    "no method key": (methods({}), 400, "E_BAD_PARAM", FIRST, '"method"'),
    "method of wrong type": (methods({"method": 3}), 400, "E_BAD_PARAM", FIRST, '"method"'),
    "unknown option": (vhr(beta=1), 400, "E_BAD_PARAM", f"{FIRST}.beta", "unknown key"),
    "unknown key": (
        {"steering": {"methods": QUIET, "mode": 1}}, 400, "E_BAD_PARAM", "steering.mode",
        "preset, methods, report"),
    "unknown report level": (
        {"steering": {"methods": QUIET, "report": "all"}}, 400, "E_BAD_PARAM",
        "steering.report", "summary"),
    "layer out of range": (
        vhr(heads=[[30, 0]]), 400, "E_LAYER_RANGE", f"{FIRST}.heads[0][0]", "0 .. 29"),
    "negative layer": (
        vhr(heads=[[-1, 0]]), 400, "E_LAYER_RANGE", f"{FIRST}.heads[0][0]", "0 .. 29"),
    "head out of range": (
        vhr(heads=[[0, 0], [2, 9]]), 400, "E_HEAD_RANGE", f"{FIRST}.heads[1][1]", "0 .. 8"),
    "no heads": (vhr(heads=[]), 400, "E_BAD_PARAM", f"{FIRST}.heads", "no head"),
    "a head twice": (
        vhr(heads=[[1, 1], [1, 1]]), 400, "E_BAD_PARAM", f"{FIRST}.heads[1]", "twice"),
    "a head with three numbers": (
        vhr(heads=[[1, 1, 1]]), 400, "E_BAD_PARAM", f"{FIRST}.heads[0]", "2"),
    "a head that is a string": (
        vhr(heads=[["1", 1]]), 400, "E_BAD_PARAM", f"{FIRST}.heads[0][0]", "integer"),
    "alpha is a string": (vhr(alpha="2"), 400, "E_BAD_PARAM", f"{FIRST}.alpha", "number"),
    "alpha is a boolean": (vhr(alpha=True), 400, "E_BAD_PARAM", f"{FIRST}.alpha", "number"),
    "alpha is null": (vhr(alpha=None), 400, "E_BAD_PARAM", f"{FIRST}.alpha", "number"),
    "alpha too large": (vhr(alpha=11), 400, "E_BAD_PARAM", f"{FIRST}.alpha", "10"),
    "alpha negative": (vhr(alpha=-0.5), 400, "E_BAD_PARAM", f"{FIRST}.alpha", "0"),
    "nothing asked": ({"steering": {}}, 400, "E_BAD_PARAM", "steering", "exactly one"),
    "preset and methods": (
        {"steering": {"preset": "quiet", "methods": QUIET}}, 400, "E_BAD_PARAM", "steering",
        "exactly one"),
    "empty methods": (methods(), 400, "E_BAD_PARAM", "steering.methods", "1"),
    "too many methods": (methods(*QUIET * 17), 400, "E_BAD_PARAM", "steering.methods", "16"),
    "unknown preset": (
        {"steering": {"preset": "nope"}}, 404, "E_PRESET_NOT_FOUND", "steering.preset", "quiet"),
    "a list": ({"steering": []}, 400, "E_BAD_PARAM", "steering", "object"),
    "a number": ({"steering": 3}, 400, "E_BAD_PARAM", "steering", "object"),
    "false": ({"steering": False}, 400, "E_BAD_PARAM", "steering", "object"),
    "a string": ({"steering": "{}"}, 400, "E_BAD_PARAM", "steering", "vllm_xargs.steering"),
    "oversize": (
        {"steering": {"methods": QUIET, "note": "x" * 70_000}}, 413, "E_TOO_LARGE", "steering",
        "65536"),
    "xargs not a string": (
        {"vllm_xargs": {"steering": {"preset": "quiet"}}}, 400, "E_BAD_PARAM",
        "vllm_xargs.steering", "string"),
    "xargs a number": (
        {"vllm_xargs": {"steering": 1}}, 400, "E_BAD_PARAM", "vllm_xargs.steering", "string"),
    "xargs not JSON": (
        {"vllm_xargs": {"steering": "{"}}, 400, "E_BAD_PARAM", "vllm_xargs.steering", "JSON"),
    "xargs with a bad method": (
        {"vllm_xargs": {"steering": json.dumps({"methods": [{"method": "magic"}]})}}, 400,
        "E_UNKNOWN_METHOD", "vllm_xargs.steering.methods[0].method", "vhr"),
    "two carriages": (
        {"steering": {"preset": "quiet"}, "vllm_xargs": {"steering": '{"preset": "quiet"}'}},
        400, "E_CONFLICT", "steering", "`vllm_xargs.steering`"),
    "alias and field": (
        {"model": f"{MODEL}:quiet", "steering": {"preset": "quiet"}}, 400, "E_CONFLICT",
        "steering", "`model`"),
    "an image method on a text model": (
        methods({"method": "var", "sink_dims": [3]}), 400, "E_NO_IMAGE", FIRST, "no images"),
    "a text to emphasise that is not there": (
        methods({"method": "emphasis", "spans": [{"text": "zebra"}]}), 400, "E_BAD_PARAM",
        f"{FIRST}.spans[0].text", "'zebra'"),
    "a span in two forms": (
        methods({"method": "emphasis", "spans": [{"text": "sea", "tokens": [0, 1]}]}), 400,
        "E_BAD_PARAM", f"{FIRST}.spans[0]", "exactly one"),
    "a message that is not there": (
        methods({"method": "emphasis", "spans": [{"message": 7}]}), 400, "E_BAD_PARAM",
        f"{FIRST}.spans[0].message", ""),
    "two emphases": (
        methods(
            {"method": "emphasis", "spans": [{"text": "sea"}]},
            {"method": "emphasis", "spans": [{"text": "village"}]},
        ), 400, "E_CONFLICT", "steering.methods[1]", "steering.methods[0]"),
    "two windows": (
        methods({"method": "locore"}, {"method": "locore", "window": 3}), 400, "E_CONFLICT",
        "steering.methods[1]", "locore and locore"),
    "layers and heads": (
        methods({"method": "locore", "layers": [1], "heads": [[1, 1]]}), 400, "E_BAD_PARAM",
        f"{FIRST}.layers", "leave"),
    "u without identity": (
        methods({"method": "head_ablation", "heads": [[1, 1]], "u": 0.5}), 400, "E_BAD_PARAM",
        f"{FIRST}.u", "identity"),
    "automatic heads": (
        vhr(heads="auto"), 400, "E_NO_IMAGE", FIRST, "takes no images"),
    "forged program": (
        {"vllm_xargs": {"headway": "x"}}, 400, "E_BAD_PARAM", "vllm_xargs.headway", "reserved"),
}  # fmt: skip


def check(response: Any, status: int, reason: str, param: str, text: str) -> None:
    error = response.json()["error"]
    assert response.status_code == error["code"] == status, error
    assert (error["reason"], error["param"]) == (reason, param)
    assert text in error["message"]
    assert error["type"]
    assert "x-headway-fingerprint" not in response.headers


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_a_bad_request_is_refused(server: Server, path: str, row: Any) -> None:
    fields, *expected = row
    check(server.http.post(path, json=bodies(**fields)[path]), *expected)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_dry_run_says_the_same(server: Server, row: Any) -> None:
    fields, *expected = row
    if expected[2] == "vllm_xargs.headway":
        pytest.skip("seen by the engine's front end only")
    check(server.http.post("/v1/steering/compile", json=chat_body(**fields)), *expected)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_numbers_are_finite(server: Server, path: str, number: str) -> None:
    body = json.dumps(bodies(**vhr(alpha="@"))[path]).replace('"@"', number)
    headers = {"content-type": "application/json"}
    response = server.http.post(path, content=body, headers=headers)
    check(response, 400, "E_BAD_PARAM", f"{FIRST}.alpha", "finite")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_beam_search_is_refused(server: Server, path: str) -> None:
    fields = {"use_beam_search": True, "n": 2, "steering": {"methods": QUIET}}
    response = server.http.post(path, json=bodies(**fields)[path])
    check(response, 400, "E_UNSUPPORTED", "use_beam_search", "beam search")


def test_a_background_response_is_refused(server: Server) -> None:
    fields = {"background": True, "store": True, "steering": {"methods": QUIET}}
    response = server.http.post(RESPONSES, json=bodies(**fields)[RESPONSES])
    check(response, 400, "E_UNSUPPORTED", "background", "background")


ELSEWHERE = {
    "/v1/embeddings": {"input": PROMPT},
    "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": PROMPT}]]},
    "/v1/chat/completions/render": {"messages": [{"role": "user", "content": PROMPT}]},
    "/v1/completions/render": {"prompt": PROMPT},
    "/inference/v1/generate": {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2}},
    "/tokenize": {"prompt": PROMPT},
    "/pooling": {"input": PROMPT},
    "/invocations": {"messages": [{"role": "user", "content": PROMPT}]},
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"steering": {"preset": "quiet"}}, "steering"),
        ({"vllm_xargs": {"steering": '{"preset": "quiet"}'}}, "vllm_xargs.steering"),
    ],
    ids=["field", "xargs"],
)
@pytest.mark.parametrize("path", ELSEWHERE)
def test_endpoints_that_cannot_steer_refuse(
    server: Server, path: str, fields: dict[str, Any], param: str
) -> None:
    response = server.http.post(path, json={"model": MODEL, **ELSEWHERE[path], **fields})
    check(response, 400, "E_UNSUPPORTED", param, path)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages"])
def test_endpoints_that_cannot_steer_serve_as_ever(server: Server, path: str) -> None:
    response = server.http.post(path, json={"model": MODEL, **ELSEWHERE[path]})
    assert response.status_code == 200, response.text


def test_a_program_cannot_be_forged_on_another_endpoint(server: Server) -> None:
    sampling = {"max_tokens": 2, "extra_args": {"headway": {"fingerprint": "x", "head_edits": []}}}
    body = {"model": MODEL, "token_ids": [1, 2, 3], "sampling_params": sampling}
    response = server.http.post("/inference/v1/generate", json=body)
    check(response, 400, "E_BAD_PARAM", "vllm_xargs.headway", "reserved")
