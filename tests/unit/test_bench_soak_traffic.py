"""The traffic of `headway bench soak`: drawn from a seed, valid, and refused where it must be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from headway.benchmarks.soak_asks import CHAT, COMPLETIONS, RESPONSES, Ask, Expected, Place
from headway.benchmarks.soak_largest import largest
from headway.benchmarks.soak_load import Driver
from headway.benchmarks.soak_profiles import (
    PRESETS,
    PROFILES,
    artifact,
    delete_shared,
    drawn,
    put_shared,
)
from headway.benchmarks.soak_refusals import NOT_DRIVEN, refusals
from headway.benchmarks.soak_specs import MIXES, SPECS, ZEROS
from headway.benchmarks.soak_traffic import DECK, KINDS, script
from headway.server.http.admin import AdminKeys
from headway.server.http.prompts import check_prompt
from headway.steering import ModelGeometry, Reason, compile_spec, parse_spec
from headway.steering.profiles import NamedProfiles
from headway.steering.registry import METHODS
from tests import registry
from tests.registry_app import Server

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(30, 9, 3, 64, 576, architecture="LlamaForCausalLM")
PLACE = Place("smollm2", GEOMETRY, 1024, frozenset(SPECS), tuple(PRESETS))
COMPILE = "/v1/steering/compile"
DECKS = 4


def asks(place: Place = PLACE, seed: int = 0, decks: int = DECKS) -> Iterator[Ask]:
    """All requests of some decks of scripts."""
    for number in range(decks * len(DECK)):
        yield from chain.from_iterable(script(place, seed, number))


def steering_of(body: dict[str, Any]) -> Any:
    if "vllm_xargs" in body:
        return json.loads(body["vllm_xargs"]["steering"])
    if "steering" in body:
        return body["steering"]
    return {"preset": body["model"].rpartition(":")[2]}


@pytest.fixture(scope="module")
def geometry() -> ModelGeometry:
    """With the shared profiles."""
    named = {name: drawn(GEOMETRY, kind, 0) for kind, name in PROFILES.items()}
    return replace(GEOMETRY, profiles=NamedProfiles(named))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """The routes of steering over an empty registry."""
    made = Server(tmp_path, AdminKeys(["right"]))
    text = SimpleNamespace(model_type="llama")
    made.state.vllm_config.model_config = SimpleNamespace(
        hf_text_config=text, enforce_eager=True, get_total_num_hidden_layers=lambda: 4
    )
    return made


@pytest.fixture
async def driver(server: Server) -> Any:
    transport = httpx.ASGITransport(app=server.app)
    async with Driver("http://test", "right", transport=transport) as found:
        yield found


def test_a_script_is_known_by_seed_and_number() -> None:
    assert script(PLACE, 3, 17) == script(PLACE, 3, 17)
    assert list(asks(seed=1, decks=1)) == list(asks(seed=1, decks=1))
    assert list(asks(seed=1, decks=1)) != list(asks(seed=2, decks=1))


def test_every_kind_comes_as_often_as_its_row_says() -> None:
    for deck in range(DECKS):
        numbers = range(deck * len(DECK), (deck + 1) * len(DECK))
        kinds = Counter(script(PLACE, 0, number)[0][0].kind for number in numbers)
        assert kinds == {kind: cards for kind, (cards, _) in KINDS.items()}


def test_every_method_for_text_is_asked_for_on_every_route() -> None:
    assert set(SPECS) == set(METHODS) - {"var"}  # which needs images
    assert set(chain.from_iterable(MIXES.values())) | {"head_ablation"} == set(SPECS)
    found = {
        (method["method"], ask.path)
        for ask in asks(decks=12)
        if ask.steered and "preset" not in steering_of(ask.body)
        for method in steering_of(ask.body)["methods"]
    }
    text_routes = {(method, path) for method in SPECS for path in (CHAT, COMPLETIONS)}
    assert text_routes <= found
    assert len({method for method, path in found if path == RESPONSES}) > 3


def test_traffic_has_every_option() -> None:
    bodies = [ask.body for ask in asks() if ask.generates and isinstance(ask.body, dict)]
    keys = Counter(key for body in bodies for key in body)
    options = {"stream", "n", "seed", "stop", "logprobs", "structured_outputs", "response_format"}
    options |= {"prompt_logprobs", "min_tokens", "stream_options", "vllm_xargs", "steering"}
    assert options <= keys.keys()
    streamed = [ask for ask in asks() if ask.is_stream]
    assert any(ask.pause for ask in streamed)
    assert any(ask.leave_lines is not None for ask in streamed)
    assert any(ask.leave_seconds and not ask.is_stream for ask in asks())


def test_what_is_to_be_steered_compiles(geometry: ModelGeometry) -> None:
    fingerprints = set()
    for ask in asks():
        if ask.steered:
            spec = steering_of(ask.body)
            if spec.get("preset", "").startswith("soak-0-"):
                continue  # one of the script itself
            named = [each.get("profile", "") for each in spec.get("methods", ())]
            if any(name.startswith("soak-0-") for name in named):
                continue
            program = compile_spec(parse_spec(spec), geometry, PRESETS)
            check_prompt(program, ask.body)
            fingerprints.add(program.fingerprint)
    assert len(fingerprints) > 100


def test_strength_zero_changes_nothing(geometry: ModelGeometry) -> None:
    for method in ZEROS.values():
        assert compile_spec(parse_spec({"methods": [method]}), geometry).is_identity


def test_what_is_compared_with_stock_is_unsteered_and_says_enough() -> None:
    sampled = [ask for ask in asks() if ask.sampled]
    assert len(sampled) > 40
    for ask in sampled:
        assert ask.body["return_tokens_as_token_ids"] and ask.body["logprobs"]
        assert ask.body["temperature"] == 0 or "seed" in ask.body
        assert not ask.is_stream
        if ask.steered:
            assert steering_of(ask.body)["methods"][0] in ZEROS.values()


def test_one_prompt_is_steered_and_not_at_the_same_time() -> None:
    number = next(n for n in range(999) if script(PLACE, 0, n)[0][0].kind == "same prompt")
    for step in script(PLACE, 0, number):
        texts = {ask.body.get("prompt") or ask.body["messages"][0]["content"] for ask in step}
        assert len(texts) == 1
        assert sorted(ask.steered for ask in step) == [False, True, True]


def test_the_largest_requests_come_as_many_as_run_at_a_time(geometry: ModelGeometry) -> None:
    steps = largest(PLACE, 0, 16)
    assert steps == largest(PLACE, 0, 16) and {len(step) for step in steps} == {16}
    for ask in chain.from_iterable(steps):
        assert ask.generates and not ask.sampled and ask.kind not in KINDS
        if ask.steered:
            check_prompt(compile_spec(parse_spec(steering_of(ask.body)), geometry), ask.body)
    methods = {
        method["method"]
        for ask in chain.from_iterable(steps)
        if ask.steered
        for method in steering_of(ask.body)["methods"]
    }
    assert methods == {"sgrs", "locore", "emphasis"}
    without = largest(replace(PLACE, methods=frozenset({"head_scale"})), 0, 16)
    assert "sgrs" not in json.dumps([ask.body for step in without for ask in step])


def test_methods_that_a_server_lacks_are_not_asked_for() -> None:
    without = replace(PLACE, methods=PLACE.methods - {"sgrs", "gact"}, presets=("soak-heads",))
    found = list(asks(without))
    used = {
        method["method"]
        for ask in found
        if ask.steered and "preset" not in steering_of(ask.body)
        for method in steering_of(ask.body)["methods"]
    }
    assert used == set(SPECS) - {"sgrs", "gact"}
    assert not [ask for ask in found if ask.kind in ("sgrs", "registry")]


def test_every_reason_is_driven_or_it_says_why_not() -> None:
    driven = {ask.expected.reason for ask in refusals(PLACE, "")} - {None}
    assert driven | set(NOT_DRIVEN) == set(Reason)
    assert not driven & set(NOT_DRIVEN)


async def test_bad_requests_are_refused_as_they_say(server: Server, driver: Driver) -> None:
    place = replace(PLACE, model="base", geometry=registry.GEOMETRY)
    for ask in put_shared(place.geometry):
        assert (await driver.ask(ask)).problem is None
    rows = [ask for ask in refusals(place, "bad") if ask.expected.reason is not None]
    for ask in rows:
        if ask.path == "/tokenize" or (ask.body or {}).get("stream"):
            continue  # not without vLLM
        if ask.generates:  # the dry run says the same
            ask = replace(ask, path=COMPILE)
        outcome = await driver.ask(ask)
        assert outcome.problem is None, (ask, outcome.detail)
    for ask in delete_shared():
        assert (await driver.ask(ask)).problem is None
    assert not server.registry.store.names()


async def test_the_script_of_the_registry_leaves_nothing(server: Server, driver: Driver) -> None:
    place = replace(PLACE, model="base", geometry=registry.GEOMETRY)
    number = next(n for n in range(999) if script(place, 0, n)[0][0].kind == "registry")
    for step in script(place, 0, number):
        for ask in step:
            if ask.generates:
                gone = ask.expected.is_error and ask.expected.reason is None
                # The alias of a preset that is gone asks for no steering: a model unknown to vLLM.
                reason = Expected((400,), "E_BAD_PARAM", "steering") if gone else ask.expected
                ask = replace(ask, path=COMPILE, steered=False, expected=reason)
            outcome = await driver.ask(ask)
            assert outcome.problem is None, (ask, outcome.detail)
    assert not server.registry.store.names() and not server.registry.store.preset_names()


def test_profiles_are_small_and_the_same_each_time() -> None:
    for kind in PROFILES:
        digest, content = artifact(GEOMETRY, kind, 5)
        assert (digest, content) == artifact(GEOMETRY, kind, 5)
        assert digest != artifact(GEOMETRY, kind, 6)[0]
        assert len(content) < 64 * 1024
