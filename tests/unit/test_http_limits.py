"""Places of steered requests: counted by client, refused beyond a limit, given back in the end."""

from __future__ import annotations

import re
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from headway.server.commands import serve
from headway.server.http.clients import CLIENT
from headway.server.http.errors import error_response
from headway.server.http.exchange import Exchange
from headway.server.http.limits import Limits, Places, sequences_of
from headway.server.http.requests import SteerableChatCompletionRequest, SteerableCompletionRequest
from headway.server.http.state import ResolvedSteering
from headway.steering import Reason, SteeringError, compile_spec, parse_spec
from tests.unit.test_http_exchange import GEOMETRY, IDENTITY, STEERED, WHOLE, make_state

pytestmark = pytest.mark.unit

SGRS = {"methods": [{"method": "sgrs"}]}
READS_SALIENCY = {**STEERED, "report": {"level": "full", "saliency": True}}


def limited(**limits: int) -> Any:
    state = make_state(WHOLE)
    state.limits = Limits(**limits)
    state.places = Places(state.limits)
    return state


def asked(state: Any, client: str, steering: Any = STEERED, **fields: Any) -> Exchange:
    """The exchange of a chat request of a client, not yet opened."""
    body = SteerableChatCompletionRequest(
        messages=[{"role": "user", "content": "hi"}], model="base", **fields
    )
    spec = parse_spec(steering)
    resolved = ResolvedSteering(spec, compile_spec(spec, GEOMETRY), "base")
    raw: Any = SimpleNamespace(state=SimpleNamespace())
    token = CLIENT.set(client)
    try:
        return Exchange(state, resolved, body, raw)
    finally:
        CLIENT.reset(token)


def refused(exchange: Exchange, reason: Reason = Reason.CAPACITY) -> SteeringError:
    with pytest.raises(SteeringError) as caught:
        exchange.open()
    assert caught.value.reason is reason
    return caught.value


async def test_one_client_is_refused_while_the_other_is_served() -> None:
    state = limited(max_steered_per_key=2)
    running = [asked(state, "a") for _ in range(2)]
    for exchange in running:
        exchange.open()
    error = refused(asked(state, "a"))
    assert "2 steered sequences of this client are being served" in error.message
    assert "has 1; --max-steered-per-key allows 2" in error.message
    answer = error_response(error)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    other = asked(state, "b")
    other.open()
    asked(state, "a", IDENTITY).open()  # it changes nothing, and takes nothing
    running[0].close("ok")
    asked(state, "a").open()
    refused(asked(state, "a"))


@pytest.mark.parametrize("outcome", ["ok", "failed", "error", "cancelled"])
async def test_every_end_gives_the_place_back_once(outcome: str) -> None:
    state = limited(max_steered_requests=1, max_steered_per_key=1, max_sgrs_per_key=1)
    for _ in range(3):
        exchange = asked(state, "a", SGRS)
        exchange.open()
        refused(asked(state, "a", SGRS))
        exchange.close(outcome)
        exchange.close("cancelled")
    assert not state.places._steered and not state.places._gated


async def test_a_refused_request_leaves_nothing_behind() -> None:
    state = limited(max_steered_per_key=1)
    asked(state, "a").open()
    users = dict(state.users)
    for _ in range(3):
        refused(asked(state, "a"))
    assert state.places._steered == {"a": 1} and dict(state.users) == users


async def test_all_clients_together() -> None:
    state = limited(max_steered_requests=2)
    for client in "ab":
        asked(state, client).open()
    error = refused(asked(state, "c"))
    assert "2 steered sequences are being served" in error.message
    assert "--max-steered-requests allows 2" in error.message


@pytest.mark.parametrize("gated", [SGRS, READS_SALIENCY], ids=["sgrs", "report"])
async def test_what_reads_saliencies_has_a_limit_of_its_own(gated: Any) -> None:
    state = limited(max_sgrs_per_key=1)
    asked(state, "a", gated).open()
    assert "--max-sgrs-per-key allows 1" in refused(asked(state, "a", gated)).message
    asked(state, "b", gated).open()
    for _ in range(3):
        asked(state, "a", STEERED).open()


async def test_every_choice_counts() -> None:
    state = limited(max_steered_per_key=4)
    asked(state, "a", n=3).open()
    assert "has 2;" in refused(asked(state, "a", n=2)).message
    asked(state, "a").open()
    error = refused(asked(state, "a", n=5), Reason.BAD_PARAM)  # waiting would not help it
    assert (error.status, error.param) == (400, "n")
    assert "has 5 steered sequences; --max-steered-per-key allows 4" in error.message


@pytest.mark.parametrize(
    ("fields", "sequences"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": "a", "n": 3}, 3),
        ({"prompt": [1, 2, 3], "n": 2}, 2),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [[1, 2], [3]]}, 2),
    ],
    ids=str,
)
def test_every_prompt_counts(fields: dict[str, Any], sequences: int) -> None:
    assert sequences_of(SteerableCompletionRequest(model="base", **fields)) == sequences


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "n": 3}, "n"),
        ({"prompt": ["a"] * 3}, "prompt"),
        ({"prompt": ["a"] * 2, "n": 2}, "prompt"),
        ({"prompt": ["a"] * 2, "n": 3}, "n"),
        ({"prompt_embeds": [b"a"] * 3}, "prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": [b"a"] * 2}, "prompt_embeds"),
    ],
    ids=str,
)
async def test_the_field_that_asks_for_too_many_is_named(
    fields: dict[str, Any], param: str
) -> None:
    exchange = asked(limited(max_steered_requests=2), "a")
    exchange.body = SteerableCompletionRequest(model="base", **fields)
    assert refused(exchange, Reason.BAD_PARAM).param == param


def parsed(*options: str) -> Namespace:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    args: Namespace = serve.build_parser(ServeSubcommand()).parse_args(["serve", "m", *options])
    return args


def test_limits_are_options() -> None:
    assert Limits.of(parsed()) == Limits()
    places = ("--max-steered-requests=9", "--max-steered-per-key=3", "--max-sgrs-per-key=1")
    found = Limits.of(parsed(*places, "--max-request-body=2", "--request-body-timeout=7"))
    assert found == Limits(9, 3, 1, 2, 7) and found.body_bytes == 2 * 1024 * 1024
    assert Limits.of(Namespace()) == Limits(), "a server that `headway serve` did not start"


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_limit_is_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(f"--max-steered-per-key={value}")
    message = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "--max-steered-per-key" in message and "1 or more" in message
