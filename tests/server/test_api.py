"""Steering over HTTP: carriages, answers, streams and what stays untouched."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.server.calls import (
    CHAT,
    COMPLETIONS,
    IDENTITY,
    LOUD,
    PROMPT,
    QUIET,
    RESPONSES,
    SCALED,
    bodies,
    chat_body,
    events,
    plain,
    post,
    text_of,
    wait_for,
)
from tests.server.conftest import COLON_MODEL, MODEL, Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PATHS = (CHAT, COMPLETIONS, RESPONSES)


@pytest.fixture(autouse=True)
def nothing_goes_unsteered(server: Server) -> Any:
    yield
    assert server.metric("headway_unsteered_total") == 0
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_shows_what_was_applied(server: Server, path: str) -> None:
    body = bodies(steering={"methods": LOUD})[path]
    response = server.http.post(path, json=body)
    answer = response.json()
    steering = answer["steering"]
    assert response.headers["x-headway-fingerprint"] == steering["fingerprint"]
    assert steering["identity"] is False
    assert steering["methods"] == [
        {
            "method": "vhr",
            "alpha": 3.0,
            "layers": [0, 5, 20],
            "heads": [[0, 0], [5, 2], [20, 8]],
            "scope": "all",
            "positions_edited": steering["positions_edited"],
        }
    ]
    assert steering["positions_edited"] == steering["positions_computed"] > 0
    assert steering["sequences"] == 1
    assert steering["warnings"] == []
    assert "preset" not in steering
    kept = server.http.get(f"/v1/steering/reports/{answer['id']}")
    assert kept.json() == steering
    assert text_of(answer) != text_of(post(server, path, bodies()[path]))


@pytest.mark.parametrize("path", PATHS)
def test_an_unsteered_answer_has_no_trace(server: Server, path: str) -> None:
    for fields in ({}, {"steering": None}):
        response = server.http.post(path, json=bodies(**fields)[path])
        assert "steering" not in response.json()
        assert "x-headway-fingerprint" not in response.headers


@pytest.mark.parametrize("path", PATHS)
def test_the_carriages_are_equal(server: Server, path: str) -> None:
    inline = post(server, path, bodies(steering={"methods": QUIET})[path])
    xargs = {"steering": json.dumps({"methods": QUIET}), "other": 1}
    texts = {text_of(inline)}
    for fields in (
        {"steering": {"preset": "quiet"}},
        {"vllm_xargs": xargs},
        {"model": f"{MODEL}:quiet"},
        {"model": f"{COLON_MODEL}:quiet"},
    ):
        answer = post(server, path, bodies(**fields)[path])
        assert answer["steering"]["fingerprint"] == inline["steering"]["fingerprint"]
        assert answer["steering"].get("preset") == (None if "vllm_xargs" in fields else "quiet")
        texts.add(text_of(answer))
    assert len(texts) == 1
    assert texts != {text_of(post(server, path, bodies()[path]))}


def test_served_names_with_colons_are_not_aliases(server: Server) -> None:
    assert "steering" not in post(server, CHAT, chat_body(model=COLON_MODEL))


@pytest.mark.parametrize("model", [f"{MODEL}:nope", "nope:quiet"])
def test_an_unknown_alias_is_an_unknown_model(server: Server, model: str) -> None:
    response = server.http.post(CHAT, json=chat_body(model=model))
    assert response.status_code == 404
    assert model in response.json()["error"]["message"]


def test_aliases_are_listed_with_their_parents(server: Server) -> None:
    cards = {card["id"]: card for card in server.http.get("/v1/models").json()["data"]}
    assert cards[MODEL]["parent"] is None
    for base in (MODEL, COLON_MODEL):
        for preset in ("quiet", "loud"):
            assert cards[f"{base}:{preset}"]["parent"] == base
            assert cards[f"{base}:{preset}"]["max_model_len"] == 1024
    assert len(cards) == 6


@pytest.mark.parametrize("path", PATHS)
def test_strength_zero_is_the_unsteered_answer(server: Server, path: str) -> None:
    # Twice, so that both find the prompt in the prefix cache: usage tells cached tokens.
    post(server, path, bodies()[path])
    unsteered = post(server, path, bodies()[path])
    answer = post(server, path, bodies(steering={"methods": IDENTITY})[path])
    assert answer["steering"]["identity"] is True
    assert answer["steering"]["positions_edited"] == 0
    assert plain(answer) == plain(unsteered)


def test_report_none_leaves_only_the_header(server: Server) -> None:
    steering = {"methods": QUIET, "report": "none"}
    response = server.http.post(CHAT, json=chat_body(steering=steering))
    assert "steering" not in response.json()
    assert response.headers["x-headway-fingerprint"]
    assert events(server, CHAT, chat_body(steering=steering))[-2].count("fingerprint") == 1


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_streams_show_it_on_the_last_chunk(server: Server, path: str, usage: bool) -> None:
    body = bodies(steering={"methods": LOUD})[path]
    options = {"stream_options": {"include_usage": usage}}
    data = events(server, path, {**body, **options})
    assert data[-1] == "[DONE]"
    chunks = [json.loads(item) for item in data[:-1]]
    assert ["steering" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert ("usage" in chunks[-1] and chunks[-1]["choices"] == []) is usage
    whole = post(server, path, body)
    streamed = "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
    )
    assert streamed == text_of(whole)
    assert chunks[-1]["steering"]["fingerprint"] == whole["steering"]["fingerprint"]
    assert chunks[-1]["steering"]["methods"] == whole["steering"]["methods"]


def test_a_streamed_response_shows_it_when_completed(server: Server) -> None:
    body = bodies(steering={"preset": "loud"})[RESPONSES]
    data = [json.loads(item) for item in events(server, RESPONSES, body)]
    assert data[-1]["type"] == "response.completed"
    assert data[-1]["response"]["steering"]["preset"] == "loud"
    assert text_of(data[-1]["response"]) == text_of(post(server, RESPONSES, body))


def test_the_openai_client_sees_it(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    ask: dict[str, Any] = dict(
        model=MODEL, messages=[{"role": "user", "content": PROMPT}], max_tokens=8
    )
    steered = {"steering": {"methods": QUIET}}
    answer = client.chat.completions.create(**ask, extra_body=steered)
    fingerprint = answer.to_dict()["steering"]["fingerprint"]  # type: ignore[index]
    with client.chat.completions.with_raw_response.create(
        **ask, stream=True, extra_body=steered
    ).parse() as stream:
        chunks = list(stream)
    assert chunks[-1].to_dict()["steering"]["fingerprint"] == fingerprint  # type: ignore[index]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask, extra_body={"steering": {"methods": []}})
    assert caught.value.param == "steering.methods"
    assert caught.value.body["reason"] == "E_BAD_PARAM"  # type: ignore[index]


def test_several_choices(server: Server) -> None:
    body = chat_body(steering={"methods": QUIET}, n=2, temperature=1.0, seed=1)
    answer = post(server, CHAT, body)
    assert len(answer["choices"]) == 2
    assert answer["steering"]["sequences"] == 2
    chunks = [json.loads(item) for item in events(server, CHAT, body)[:-1]]
    assert chunks[-1]["steering"]["sequences"] == 2
    assert sum("steering" in chunk for chunk in chunks) == 1


def test_several_prompts(server: Server) -> None:
    body = bodies(steering={"methods": QUIET}, prompt=[PROMPT, "One, two,"])[COMPLETIONS]
    answer = post(server, COMPLETIONS, body)
    assert len(answer["choices"]) == 2
    assert answer["steering"]["sequences"] == 2


def test_logprobs_are_those_of_the_steered_model(server: Server) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    steered = post(server, CHAT, chat_body(steering={"methods": LOUD}, **fields))
    unsteered = post(server, CHAT, chat_body(**fields))
    first, other = (
        answer["choices"][0]["logprobs"]["content"][0] for answer in (steered, unsteered)
    )
    assert len(first["top_logprobs"]) == 2
    assert first["logprob"] != other["logprob"]


def test_prompt_logprobs(server: Server) -> None:
    body = bodies(steering={"methods": LOUD}, prompt_logprobs=0)[COMPLETIONS]
    answer = post(server, COMPLETIONS, body)
    steering = answer["steering"]
    assert len(answer["choices"][0]["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert steering["positions_computed"] >= answer["usage"]["prompt_tokens"]


def test_stop_seed_and_sampling(server: Server) -> None:
    body = chat_body(steering={"methods": QUIET}, temperature=0.8, seed=7, max_tokens=32)
    first, again = post(server, CHAT, body), post(server, CHAT, body)
    assert text_of(first) == text_of(again)
    word = text_of(first).split()[1]
    stopped = post(server, CHAT, {**body, "stop": [word]})
    assert text_of(stopped) == text_of(first).partition(word)[0]
    assert stopped["steering"]["positions_edited"] > 0


def test_tools(server: Server) -> None:
    weather = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": weather}]
    body = chat_body(steering={"methods": QUIET}, tools=tools, tool_choice="auto")
    assert post(server, CHAT, body)["steering"]["positions_edited"] > 0
    assert "steering" in json.loads(events(server, CHAT, body)[-2])


def test_a_full_batch_of_different_programs(server: Server) -> None:
    methods = (None, QUIET, LOUD, SCALED)
    prompts = [f"Tell me {count} things about the {noun}." for count in (2, 3, 5, 7)
               for noun in ("sea", "moon")]  # fmt: skip
    batch = [
        chat_body(prompt, **({"steering": {"methods": method}} if method else {}))
        for prompt in prompts
        for method in methods
    ]
    assert len(batch) == 32
    alone = [text_of(post(server, CHAT, body)) for body in batch]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda body: text_of(post(server, CHAT, body)), batch))
    assert together == alone
    assert len(set(alone)) > len(prompts)


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_harms_nobody(server: Server, path: str) -> None:
    fields = {"max_output_tokens": 500} if path == RESPONSES else {"max_tokens": 500}
    body = bodies(steering={"methods": QUIET}, ignore_eos=True, **fields)[path]
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            short = httpx.Timeout(5, read=1.0 if not stream else 0.2)
            with httpx.stream(
                "POST", f"{server.url}{path}", json={**body, "stream": stream}, timeout=short
            ) as response:
                for line in response.iter_lines():
                    if line:
                        raise httpx.ReadTimeout("enough")
    again = post(server, path, bodies(steering={"methods": QUIET})[path])
    assert again["steering"]["positions_edited"] > 0
    assert wait_for(lambda: server.metric("headway_active_requests") == 0)


LOCORE = {"method": "locore", "beta": 1.0}


def emphasis(text: str) -> dict[str, Any]:
    return {"method": "emphasis", "spans": [{"text": text}], "alpha": 0.05}


@pytest.mark.parametrize("path", PATHS)
def test_attention_edits_are_applied_and_counted_by_scope(server: Server, path: str) -> None:
    rows = server.metric("headway_attention_rows_total", method="locore")
    answer = post(server, path, bodies(steering={"methods": [LOCORE, emphasis("village")]})[path])
    locore, marked = answer["steering"]["methods"]
    assert locore["layers"] == list(range(8, 14)) and locore["scope"] == "output"
    assert locore["positions_edited"] == 15  # of 16 tokens, the last is never fed back
    assert marked["positions_edited"] == answer["steering"]["positions_computed"]
    assert text_of(answer) != text_of(post(server, path, bodies()[path]))
    assert server.metric("headway_attention_rows_total", method="locore") == rows + 15 * 6


@pytest.mark.parametrize("path", PATHS)
def test_a_span_of_text_is_found_in_the_rendered_prompt(server: Server, path: str) -> None:
    """Different spans are different edits; the same span twice is the same edit."""
    texts = [
        text_of(post(server, path, bodies(steering={"methods": [emphasis(span)]})[path]))
        for span in ("village", "village", "Once upon a time")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_spans_of_messages(server: Server) -> None:
    messages = [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": [{"type": "text", "text": "Which is red, blood or grass?"}]},
    ]
    answers = []
    for span in ({"message": 1, "start": 14, "end": 19}, {"message": -1, "start": 23, "end": 28}):
        method = {"method": "emphasis", "spans": [span], "alpha": 0.01}
        body = chat_body(steering={"methods": [method]})
        answers.append(text_of(post(server, CHAT, {**body, "messages": messages})))
    assert answers[0] != answers[1]


def test_a_full_report_shows_class_masses(server: Server) -> None:
    method = {**LOCORE, "heads": [[9, 2], [12, 0]]}
    answer = post(server, CHAT, chat_body(steering={"methods": [method], "report": "full"}))
    masses = answer["steering"]["class_masses"]
    assert [(each["layer"], each["head"]) for each in masses] == [(9, 2), (12, 0)]
    for each in masses:
        assert 0 < each["output_mean"]["class_b"] < 1
        assert each["output_mean"]["image"] == 0
    summary = post(server, CHAT, chat_body(steering={"methods": [method]}))
    assert "class_masses" not in summary["steering"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_span_that_only_the_rendered_prompt_can_judge(
    server: Server, path: str, stream: bool
) -> None:
    """Token positions beyond the prompt are a 400 in a stream too, which then never begins."""
    method = {"method": "emphasis", "spans": [{"tokens": [0, 900]}]}
    body = {**bodies(steering={"methods": [method]})[path], "stream": stream}
    response = server.http.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["reason"], error["param"]) == (
        "E_BAD_PARAM",
        "steering.methods[0].spans[0].tokens[1]",
    )
