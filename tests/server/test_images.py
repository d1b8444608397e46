"""Steering by images over HTTP, on a server of the tiny image model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tiny_llava
from tests.server.calls import CHAT, events, post, text_of
from tests.server.conftest import Server, running_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NAME = "tiny-llava"
VAR = {"method": "var", "sink_dims": tiny_llava.SINK_DIMS, "tau": tiny_llava.TAU, "layers": [1, 2]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server; ended after this module."""
    folder = tmp_path_factory.mktemp("images")
    model = tiny_llava.build(folder / "model")
    flags = ("--served-model-name", NAME, "--dtype", "float32", "--enforce-eager")
    sizes = ("--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "8")
    yield from running_server(folder, model, (*flags, *sizes))


def picture(seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    tiny_llava.picture(seed).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        **fields,
    }


def logprobs(answer: dict[str, Any]) -> list[float]:
    return [each["logprob"] for each in answer["choices"][0]["logprobs"]["content"]]


def test_var_over_http(images: Server) -> None:
    plain = post(images, CHAT, body(picture(1), "What is it?"))
    answer = post(images, CHAT, body(picture(1), "What is it?", steering={"methods": [VAR]}))
    steering = answer["steering"]
    assert 0 < steering["image_centric_share"] <= 1
    (method,) = steering["methods"]
    assert method["scope"] == "after_image" and method["layers"] == [1, 2]
    # Neither the image nor the text before it is edited.
    assert 0 < method["positions_edited"] < steering["positions_computed"] - 16
    assert logprobs(answer) != pytest.approx(logprobs(plain), abs=1e-4)
    assert images.metric("headway_attention_rows_total", method="var") > 0


def test_several_images_and_a_stream(images: Server) -> None:
    parts = (picture(1), "and", picture(2), "Which is brighter?")
    answer = post(images, CHAT, body(*parts, steering={"methods": [VAR]}))
    lines = events(images, CHAT, body(*parts, steering={"methods": [VAR]}))
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    text = "".join(
        chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]
    )
    assert text == text_of(answer)
    assert chunks[-1]["steering"]["fingerprint"] == answer["steering"]["fingerprint"]


def test_heads_chosen_by_the_prompt_are_told_and_repeat_the_answer(images: Server) -> None:
    auto = {"method": "vhr", "alpha": 2.0, "heads": "auto", "layers": [0, 1, 3]}
    parts = (picture(3), "What is it?")
    plain = post(images, CHAT, body(*parts))
    answer = post(images, CHAT, body(*parts, steering={"methods": [auto]}))
    (method,) = answer["steering"]["methods"]
    heads = method["heads"]
    assert {layer for layer, _ in heads} == {0, 1, 3}
    assert method["positions_edited"] == answer["steering"]["positions_computed"]
    drawn = body(*parts, n=2, seed=1, steering={"methods": [auto]}) | {"temperature": 1.0}
    several = post(images, CHAT, drawn)["steering"]
    assert several["sequences"] == 2 and several["methods"][0]["heads"] == heads
    assert logprobs(answer) != pytest.approx(logprobs(plain), abs=1e-4)
    given = {"method": "vhr", "alpha": 2.0, "heads": heads}
    again = post(images, CHAT, body(*parts, steering={"methods": [given]}))
    assert text_of(again) == text_of(answer)
    assert logprobs(again) == pytest.approx(logprobs(answer), abs=1e-4)
    lines = events(images, CHAT, body(*parts, stream=True, steering={"methods": [auto]}))
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    assert chunks[-1]["steering"]["methods"][0]["heads"] == heads


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_too_long_to_choose_heads_by_is_refused(images: Server, stream: bool) -> None:
    parts = (picture(3), "word " * 300)
    asked = body(*parts, stream=stream, steering={"methods": [VAR, {"method": "vhr"}]})
    response = images.http.post(CHAT, json=asked)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["reason"], error["param"]) == ("E_PROMPT_TOO_LONG", "steering.methods[1]")
    assert "at most 249 tokens" in error["message"]
    assert text_of(post(images, CHAT, body(*parts)))  # in parts, where no heads are chosen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("method", "parts", "reason", "param"),
    [
        (VAR, ("No picture.",), "E_NO_IMAGE", "steering.methods[0]"),
        ({"method": "vhr"}, ("No picture.",), "E_NO_IMAGE", "steering.methods[0]"),
        ({**VAR, "p": 0.0}, ("No picture.",), "E_NO_IMAGE", "steering.methods[0]"),
        (
            {"method": "var"},
            (picture(1), "What?"),
            "E_NO_SINK_DIMS",
            "steering.methods[0].sink_dims",
        ),
        (
            {**VAR, "sink_dims": [256]},
            (picture(1), "What?"),
            "E_BAD_PARAM",
            "steering.methods[0].sink_dims[0]",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    images: Server, stream: bool, method: dict, parts: tuple, reason: str, param: str
) -> None:
    asked = body(*parts, steering={"methods": [method]}, stream=stream)
    for path in (CHAT, "/v1/steering/compile"):
        response = images.http.post(path, json=asked)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["reason"], error["param"]) == (reason, param)


def test_var_and_locore_conflict(images: Server) -> None:
    methods = [VAR, {"method": "locore", "layers": [2]}]
    response = images.http.post(CHAT, json=body(picture(1), "?", steering={"methods": methods}))
    error = response.json()["error"]
    assert (error["reason"], error["param"]) == ("E_CONFLICT", "steering.methods[1]")
    assert "var" in error["message"] and "locore" in error["message"]


def test_a_refused_request_leaves_its_image_usable(images: Server) -> None:
    """vLLM caches processed images on both sides of a process boundary; they must not part."""
    method = {"method": "emphasis", "spans": [{"tokens": [0, 500]}]}
    parts = (picture(77), "What is it?")
    for _ in range(2):
        refused = images.http.post(CHAT, json=body(*parts, steering={"methods": [method]}))
        assert refused.status_code == 400
        assert text_of(post(images, CHAT, body(*parts)))
