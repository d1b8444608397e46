"""Specs near good ones, and arbitrary JSON: refused as they should be, or compiled always alike."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.benchmarks.soak_profiles import PRESETS, PROFILES, drawn
from headway.benchmarks.soak_specs import MIXES, SPECS
from headway.server.http.carriage import single, take_carriages
from headway.server.http.guard import find_steering
from headway.server.http.prompts import check_prompt
from headway.steering import ModelGeometry, SteeringError, compile_spec, parse_spec
from headway.steering.errors import HTTP_STATUS, Reason
from headway.steering.profiles import NamedProfiles
from headway.steering.wire import decode_program, encode_program

pytestmark = pytest.mark.unit

BARE = ModelGeometry(6, 4, 2, 16, 64, architecture="LlamaForCausalLM")
GEOMETRY = replace(
    BARE,
    profiles=NamedProfiles({name: drawn(BARE, kind, 0) for kind, name in PROFILES.items()}),
)
PROMPT = "Tell me about the river, the library and the town."

numbers = st.one_of(
    st.integers(-3, 10),
    st.integers(),
    st.floats(),
    st.sampled_from([0, -0.0, 1e-320, 1e308, 2**31, 2**63, 10**40]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
words = st.sampled_from(
    ["methods", "method", "preset", "report", "profile", "layers", "heads", "alpha", "spans"]
    + [*SPECS, *PROFILES.values(), *PRESETS, "auto", "all", "default", "level", "saliency"]
)
json_values = st.recursive(
    scalars | words,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(words | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def good_specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec that the model takes."""
    names = draw(st.sampled_from([*((name,) for name in SPECS), *MIXES.values()]))
    random = Random(draw(st.integers(0, 2**32)))
    report = draw(st.sampled_from(["none", "summary", "full", {"level": "none", "saliency": True}]))
    return {"methods": [SPECS[name](random, GEOMETRY, PROMPT) for name in names], "report": report}


@st.composite
def near_specs(draw: st.DrawFn) -> Any:
    """A good spec with up to three places changed: replaced, deleted, repeated or added to."""
    spec: Any = copy.deepcopy(draw(good_specs()))
    for _ in range(draw(st.integers(1, 3))):
        places = [(holder, key) for holder in containers(spec) for key in keys(holder)]
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "delete", "repeat", "add"]))
        if change == "replace":
            holder[key] = draw(json_values)
        elif change == "delete":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]) if change == "repeat" else draw(scalars))
        else:
            holder[draw(words)] = draw(json_values)
    return spec


def containers(value: Any) -> list[Any]:
    """All lists and objects within a JSON value, the outermost first."""
    if not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for each in inner for found in containers(each))]


def keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def turned(value: Any, random: Random) -> Any:
    """The same JSON value with the keys of its objects in another order."""
    if isinstance(value, list):
        return [turned(each, random) for each in value]
    if not isinstance(value, dict):
        return value
    items = list(value.items())
    random.shuffle(items)
    return {key: turned(each, random) for key, each in items}


def compiled(spec: Any) -> Any:
    return compile_spec(parse_spec(spec), GEOMETRY, PRESETS)


def check(spec: Any) -> None:
    """It compiles, and alike each time; or it is refused with a path, a reason and a message."""
    try:
        program = compiled(spec)
    except SteeringError as error:
        assert error.param == "steering" or error.param.startswith(("steering.", "steering["))
        assert error.message and HTTP_STATUS.get(error.reason, 400) < 500
        assert error.reason is not Reason.STEERING_FAILED
        with pytest.raises(SteeringError) as again:
            compiled(spec)
        assert (again.value.reason, again.value.param) == (error.reason, error.param)
        return
    assert compiled(spec).fingerprint == program.fingerprint
    assert compiled(json.dumps(spec)).fingerprint == program.fingerprint
    wire = encode_program(program)
    assert wire["fingerprint"] == program.fingerprint
    decode_program(wire, GEOMETRY)  # as a worker does


slow_to_draw = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


@slow_to_draw
@given(near_specs())
def test_specs_near_good_ones(spec: Any) -> None:
    check(spec)


@slow_to_draw
@given(json_values)
def test_arbitrary_json(value: Any) -> None:
    for spec in (value, {"methods": value}, {"methods": [value]}, {"report": value}):
        check(spec)


@slow_to_draw
@given(st.text(max_size=60))
def test_arbitrary_text(text: str) -> None:
    with pytest.raises(SteeringError):
        compiled(text)


@slow_to_draw
@given(good_specs(), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(spec: dict[str, Any], random: Random) -> None:
    program = compiled(spec)
    assert compiled(turned(spec, random)).fingerprint == program.fingerprint
    check_prompt(program, {"prompt": PROMPT})


@slow_to_draw
@given(
    st.dictionaries(
        st.sampled_from(["steering", "vllm_xargs", "model", "messages", "prompt", "input"]),
        json_values | near_specs(),
        max_size=4,
    )
)
def test_arbitrary_bodies(body: dict[str, Any]) -> None:
    """What looks for steering in a body raises nothing else, and finds the same in its bytes."""
    carriages, rest = take_carriages(body)
    assert "steering" not in rest
    found = find_steering(json.dumps(body).encode())
    assert (found is None) == (not carriages)
    try:
        if carriages:
            program = compile_spec(single(carriages).spec(), GEOMETRY, PRESETS)
            check_prompt(program, body)
    except SteeringError as error:
        assert error.message


@slow_to_draw
@given(st.binary(max_size=60) | st.binary(max_size=20).map(lambda part: b'{"steering":' + part))
def test_arbitrary_bytes(body: bytes) -> None:
    find_steering(body)
    find_steering(body, whole=False)
