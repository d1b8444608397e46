"""The client over real HTTP: what it sends and reads, and that it believes nothing unproven."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest

from headway.benchmarks.quality.client import Client, EndpointError, UnsteeredAnswer
from headway.server.launch import free_port
from tests.quality.endpoint import Endpoint, running

pytestmark = pytest.mark.unit

PICTURE = "data:image/png;base64,AAAA"
LOCORE = {"method": "locore", "beta": 0.2}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with running(Endpoint()) as found:
        yield found


async def test_a_question_is_asked_greedily_with_its_picture_first(endpoint: Endpoint) -> None:
    endpoint.margin = lambda body: 2.0
    async with Client(endpoint.url, "tiny", "secret") as client:
        answer = await client.ask("Is there a fork?", PICTURE, 1, logprobs=True)
    assert answer.text == "Yes." and answer.steering is None
    assert dict(answer.top)["Yes"] - dict(answer.top)["No"] == pytest.approx(2.0)
    (body,) = endpoint.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 1)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    first, second = body["messages"][0]["content"]
    assert first["image_url"]["url"] == PICTURE
    assert second == {"type": "text", "text": "Is there a fork?"}
    assert "steering" not in body


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_the_url_may_end_in_v1(endpoint: Endpoint, suffix: str) -> None:
    async with Client(endpoint.url + suffix, "tiny") as client:
        assert (await client.ask("Describe the image.", None, 8)).text == "There is a fork."
        capabilities = await client.capabilities()
    assert capabilities is not None and capabilities["model"]["num_heads"] == 9


async def test_a_steered_answer_brings_the_proof(endpoint: Endpoint) -> None:
    async with Client(endpoint.url, "tiny") as client:
        answer = await client.ask("Is there a fork?", PICTURE, 1, [LOCORE])
    assert endpoint.bodies[0]["steering"] == {"methods": [LOCORE]}
    assert answer.steering is not None and answer.steering["methods"] == [LOCORE]


async def test_an_endpoint_that_ignores_steering_is_not_believed(endpoint: Endpoint) -> None:
    endpoint.echoes = False
    async with Client(endpoint.url, "tiny") as client:
        for call in (
            client.ask("Is there a fork?", PICTURE, 1, [LOCORE]),
            client.score_answer("Describe", PICTURE, "Two words", [LOCORE]),
            client.score_text("Two words", [LOCORE]),
        ):
            with pytest.raises(UnsteeredAnswer, match="ignored it"):
                await call
        assert (await client.ask("Is there a fork?", PICTURE, 1)).text == "Yes."


async def test_other_methods_than_asked_for_are_not_accepted(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_echo", lambda methods: {"methods": [{"method": "var"}]})
    async with Client(endpoint.url, "tiny") as client:
        with pytest.raises(UnsteeredAnswer, match="asked for locore, the answer says var"):
            await client.ask("Is there a fork?", PICTURE, 1, [LOCORE])


async def test_a_refusal_is_shown_and_not_repeated(endpoint: Endpoint) -> None:
    endpoint.refuses = "locore"
    async with Client(endpoint.url, "tiny") as client:
        with pytest.raises(EndpointError, match="HTTP 400: locore cannot be done here"):
            await client.ask("Is there a fork?", PICTURE, 1, [LOCORE])
    assert len(endpoint.bodies) == 1


async def test_a_given_text_is_scored_in_both_ways(endpoint: Endpoint) -> None:
    async with Client(endpoint.url, "tiny") as client:
        after_picture = await client.score_answer("Describe", PICTURE, "One two three")
        alone = await client.score_text("One two three")
    assert after_picture.logprobs == (-0.5, -0.5, -0.5)
    assert alone.logprobs == (-1.0, -3.0)
    chat, completion = endpoint.bodies
    assert chat["messages"][-1] == {"role": "assistant", "content": "One two three"}
    assert chat["prompt_logprobs"] == 0 and chat["add_generation_prompt"] is False
    assert (completion["prompt"], completion["logprobs"]) == ("One two three", 0)


async def test_no_more_requests_at_a_time_than_allowed(endpoint: Endpoint) -> None:
    async with Client(endpoint.url, "tiny", concurrency=3) as client:
        calls = [partial(client.ask, f"Is there a {n}?", None, 1) for n in range(24)]
        answers = await client.gather(calls, "test")
    assert [answer.text for answer in answers] == ["Yes."] * 24
    assert 1 < endpoint.most_at_once <= 3


async def test_the_first_error_ends_the_rest(endpoint: Endpoint) -> None:
    endpoint.refuses = "locore"
    async with Client(endpoint.url, "tiny", concurrency=1) as client:
        calls = [partial(client.ask, "Is there?", None, 1, [LOCORE]) for _ in range(50)]
        with pytest.raises(EndpointError, match="cannot be done"):
            await client.gather(calls, "test")
    assert len(endpoint.bodies) < 10


async def test_an_answer_of_another_shape_is_an_error(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_chat", lambda body: {"choices": []})
    async with Client(endpoint.url, "tiny") as client:
        with pytest.raises(EndpointError, match="shape"):
            await client.ask("Is there a fork?", PICTURE, 1)


async def test_an_endpoint_without_steering_has_no_capabilities(endpoint: Endpoint) -> None:
    endpoint.methods = None
    async with Client(endpoint.url, "tiny") as client:
        assert await client.capabilities() is None


async def test_an_endpoint_that_is_not_there_is_an_error() -> None:
    async with Client(f"http://127.0.0.1:{free_port()}", "tiny") as client:
        with pytest.raises(EndpointError, match="ConnectError"):
            await client.capabilities()
        with pytest.raises(EndpointError, match="ConnectError"):
            await client.ask("?", None, 1)


async def test_without_logprobs_there_are_none(endpoint: Endpoint) -> None:
    endpoint.margin = lambda body: -math.inf if body.get("logprobs") else -1.0
    async with Client(endpoint.url, "tiny") as client:
        answer = await client.ask("Is there a fork?", PICTURE, 1)
    assert (answer.text, answer.top) == ("No.", ())
