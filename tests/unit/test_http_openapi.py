"""The OpenAPI document is complete for Headway's routes, and its schemas say what is taken."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator

from headway.benchmarks.soak_profiles import PRESETS
from headway.benchmarks.soak_specs import MIXES, SPECS, ZEROS
from headway.server.http.openapi import SPEC_SCHEMA, inlined
from headway.server.http.plugin import HeadwayEndpoints
from headway.server.http.routes import STEERABLE_PATHS
from headway.steering import ModelGeometry
from headway.steering.registry import METHODS

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(30, 9, 3, 64, 576)
OWN = "/v1/steering"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """What GET /openapi.json answers."""
    app = FastAPI()
    HeadwayEndpoints().attach_router(app)
    return json.loads(json.dumps(app.openapi()))  # type: ignore[no-any-return]


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for verb, operation in item.items():
            yield path, verb, operation


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a JSON value."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            yield from parts(each)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = [part["$ref"] for part in parts(document) if isinstance(part.get("$ref"), str)]
    assert references
    for reference in references:
        found: Any = document
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]


def test_what_is_sent_has_a_body_and_what_is_refused_a_shape(document: dict[str, Any]) -> None:
    seen = set()
    for path, verb, operation in operations(document):
        if path.startswith(OWN):
            seen.add((verb, path.removeprefix(OWN)))
            assert ("requestBody" in operation) == (verb in ("put", "post")), path
            for status, response in operation["responses"].items():
                if status.startswith(("4", "5")) and status != "422":  # FastAPI's own
                    schema = response["content"]["application/json"]["schema"]
                    assert schema["$ref"].endswith("/SteeringErrorResponse"), (path, status)
            if verb in ("put", "delete") or path.endswith("feedback"):
                assert {"401", "403", "409"} <= operation["responses"].keys(), path
    assert seen == {
        ("get", "/capabilities"),
        ("post", "/compile"),
        ("get", "/presets"),
        ("put", "/presets/{name}"),
        ("delete", "/presets/{name}"),
        ("get", "/reports/{request_id}"),
        ("get", "/profiles"),
        ("get", "/profiles/{name}"),
        ("put", "/profiles/{name}"),
        ("delete", "/profiles/{name}"),
        ("post", "/profiles/{name}/feedback"),
        ("put", "/artifacts/{digest}"),
        ("get", "/artifacts/{digest}"),
    }


def test_steering_stands_in_every_steerable_request(document: dict[str, Any]) -> None:
    for path in STEERABLE_PATHS:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rpartition("/")[2]
        steering = document["components"]["schemas"][name]["properties"]["steering"]
        spec, null = steering["anyOf"]
        assert null == {"type": "null"} and spec["additionalProperties"] is False
        choices = spec["properties"]["methods"]["anyOf"][0]["items"]["oneOf"]
        assert [each["properties"]["method"]["const"] for each in choices] == list(METHODS)


def test_good_specs_are_valid_and_bad_ones_are_not() -> None:
    Draft202012Validator.check_schema(SPEC_SCHEMA)
    validator = Draft202012Validator(SPEC_SCHEMA)
    draw = random.Random(0)
    lists = [[build(draw, GEOMETRY, "some text")] for build in SPECS.values() for _ in range(20)]
    lists += [[SPECS[name](draw, GEOMETRY, "text") for name in mix] for mix in MIXES.values()]
    lists += [*([method] for method in ZEROS.values()), *PRESETS.values()]
    specs: list[Any] = [{"methods": methods, "report": "full"} for methods in lists]
    specs += [None, {"preset": "quiet"}, {"report": {"level": "none", "saliency": True}}]
    for spec in specs:
        assert not list(validator.iter_errors(spec)), spec
    heads = {"method": "vhr", "heads": [[0, 0]]}
    bad: list[Any] = [
        3,
        "vhr",
        {"methods": []},
        {"methods": [{"method": "magic"}]},
        {"methods": [heads | {"alpha": 11}]},
        {"methods": [heads | {"beta": 1}]},
        {"methods": [heads] * 17},
        {"methods": [heads], "mode": 1},
        {"methods": [heads], "report": "all"},
        {"preset": "../x"},
    ]
    for spec in bad:
        assert list(validator.iter_errors(spec)), spec
    choices = SPEC_SCHEMA["anyOf"][0]["properties"]["methods"]["anyOf"][0]["items"]["oneOf"]
    assert [each["properties"]["method"]["const"] for each in choices] == list(METHODS)


def test_references_are_replaced_by_what_they_mean() -> None:
    schema = {
        "properties": {"a": {"$ref": "#/$defs/A", "default": 1}, "b": [{"$ref": "#/$defs/B"}]},
        "$defs": {"A": {"items": {"$ref": "#/$defs/B"}}, "B": {"type": "string"}},
    }
    assert inlined(schema) == {
        "properties": {"a": {"items": {"type": "string"}, "default": 1}, "b": [{"type": "string"}]}
    }
