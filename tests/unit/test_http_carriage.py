"""The three carriages of a request, and how they are told apart."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headway.server.http.carriage import Carriage, single, split_alias, take_carriages
from headway.server.http.requests import (
    SteerableChatCompletionRequest,
    SteerableCompletionRequest,
    SteerableResponsesRequest,
)
from headway.steering import Reason, SteeringError

pytestmark = pytest.mark.unit

SPEC = {"methods": [{"method": "vhr", "heads": [[0, 0]]}]}


def test_a_body_without_steering_has_no_carriage() -> None:
    body = {"model": "m", "vllm_xargs": {"other": 1}}
    assert take_carriages(body) == ((), body)


def test_null_is_absent() -> None:
    assert take_carriages({"steering": None}) == ((), {})


def test_the_field_is_taken_out_of_the_body() -> None:
    carriages, rest = take_carriages({"model": "m", "steering": SPEC})
    assert carriages == (Carriage(SPEC, "steering"),)
    assert rest == {"model": "m"}


def test_xargs_keep_their_other_keys() -> None:
    body = {"vllm_xargs": {"steering": json.dumps(SPEC), "other": 1}}
    carriages, rest = take_carriages(body)
    assert carriages[0].param == "vllm_xargs.steering"
    assert rest == {"vllm_xargs": {"other": 1}}
    assert "steering" in body["vllm_xargs"], "the body of the caller must not change"


@pytest.mark.parametrize(
    "carriage",
    [Carriage(SPEC, "steering"), Carriage(json.dumps(SPEC), "vllm_xargs.steering")],
    ids=lambda carriage: carriage.param,
)
def test_both_carry_the_same_spec(carriage: Carriage) -> None:
    assert carriage.spec().methods == SPEC["methods"]


@pytest.mark.parametrize(
    "carriage",
    [
        Carriage(json.dumps(SPEC), "steering"),
        Carriage(SPEC, "vllm_xargs.steering"),
        Carriage(None, "vllm_xargs.steering"),
        Carriage(7, "vllm_xargs.steering"),
        Carriage("{", "vllm_xargs.steering"),
        Carriage([], "steering"),
        Carriage(True, "steering"),
    ],
    ids=repr,
)
def test_a_carriage_of_the_wrong_type_is_refused(carriage: Carriage) -> None:
    with pytest.raises(SteeringError) as caught:
        carriage.spec()
    assert caught.value.reason is Reason.BAD_PARAM
    assert caught.value.param == carriage.param


def test_two_carriages_conflict() -> None:
    carriages, _ = take_carriages({"steering": SPEC, "vllm_xargs": {"steering": json.dumps(SPEC)}})
    with pytest.raises(SteeringError, match=r"`steering` and `vllm_xargs.steering`") as caught:
        single(carriages)
    assert caught.value.reason is Reason.CONFLICT


@pytest.mark.parametrize(
    ("model", "alias"),
    [
        ("base", None),
        ("base:quiet", ("base", "quiet")),
        ("org:base", None),
        ("org:base:quiet", ("org:base", "quiet")),
        ("base:unknown", None),
        ("other:quiet", None),
        ("served:quiet", None),
        (":quiet", None),
        ("base:", None),
        ("", None),
        (None, None),
    ],
)
def test_aliases(model: str | None, alias: tuple[str, str] | None) -> None:
    served = {"base", "org:base", "served:quiet"}
    found = split_alias(model, {"quiet"}, served.__contains__)
    expected = alias and (alias[0], Carriage(alias[1], "model"))
    assert found == expected


def test_where_every_name_is_the_model_every_base_has_aliases() -> None:
    found = split_alias("whatever:quiet", {"quiet"}, lambda name: False, any_base=True)
    assert found == ("whatever", Carriage("quiet", "model"))


REQUESTS: list[tuple[type[Any], dict[str, Any]]] = [
    (SteerableChatCompletionRequest, {"messages": [{"role": "user", "content": "hi"}]}),
    (SteerableCompletionRequest, {"prompt": "hi"}),
    (SteerableResponsesRequest, {"input": "hi"}),
]


@pytest.mark.parametrize(
    ("model", "body"), REQUESTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_request_models_hand_the_carriages_on(model: type[Any], body: dict[str, Any]) -> None:
    assert model.model_validate(body).steering is None
    assert model.model_validate({**body, "steering": None}).steering is None
    # What would not pass the types of vLLM's field is still judged by us.
    request = model.model_validate({**body, "vllm_xargs": {"steering": {"nested": 1}, "k": 2}})
    assert request.steering == (Carriage({"nested": 1}, "vllm_xargs.steering"),)
    assert request.vllm_xargs == {"k": 2}
    request = model.model_validate({**body, "steering": "text"})
    assert request.steering == (Carriage("text", "steering"),)
