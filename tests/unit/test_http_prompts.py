"""What is checked of a request body before its prompt is rendered: the messages of a response."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages

from headway.server.engine.request import SteeringRequest
from headway.server.http.prompts import check_prompt, check_rendered_prompts
from headway.steering import EXTRA_ARG, ModelGeometry, SteeringError, compile_spec, parse_spec
from headway.steering.spans import message_texts

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(2, 4, 2, 8, 32)
PARTS = [{"type": "input_text", "text": "Look here."}, {"type": "input_text", "text": "Who sat?"}]
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def checked(body: dict[str, Any], *spans: dict[str, Any]) -> tuple[str, ...] | None:
    method = {"method": "emphasis", "spans": list(spans)}
    return check_prompt(compile_spec(parse_spec({"methods": [method]}), GEOMETRY), body)


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ({"input": "Who sat?"}, ("Who sat?",)),
        ({"input": "Who sat?", "instructions": "Be short."}, ("Be short.", "Who sat?")),
        ({"input": "Who sat?", "instructions": ""}, ("Who sat?",)),
        ({"input": [{"role": "user", "content": PARTS}]}, ("Look here.\nWho sat?",)),
        (
            {
                "instructions": "Be short.",
                "input": [
                    {"role": "system", "content": "Be kind."},
                    {"type": "message", "role": "user", "content": "Look."},
                    {
                        "type": "message",
                        "role": "assistant",
                        "content": [
                            {"type": "output_text", "text": "I do."},
                            {"type": "output_text", "text": "Not this."},
                        ],
                    },
                    {"role": "assistant", "content": "I did."},
                    {"role": "user", "content": "Who sat?"},
                ],
            },
            ("Be short.", "Be kind.", "Look.", "I do.", "I did.", "Who sat?"),
        ),
    ],
)
def test_the_messages_of_a_response_are_those_that_vllm_makes(
    body: dict[str, Any], texts: tuple[str, ...]
) -> None:
    assert checked(body, {"message": -1}, {"text": texts[-1]}) == texts
    request = ResponsesRequest(**body)
    made = construct_input_messages(
        request_instructions=request.instructions, request_input=request.input
    )
    plain = [
        {**message, "content": list(content)}
        if not isinstance(content := message.get("content"), str)
        else message
        for message in made
    ]
    assert tuple(message_texts(plain)) == texts


@pytest.mark.parametrize("span", [{"text": "helpful"}, {"message": 1}, {"message": -2}])
def test_a_span_that_the_messages_of_a_response_do_not_hold_is_refused(span: Any) -> None:
    """`helpful` may well be in the system prompt of the template."""
    with pytest.raises(SteeringError) as caught:
        checked({"input": "Who sat?", "previous_response_id": "resp_1"}, span)
    assert caught.value.reason == "E_BAD_PARAM"
    assert caught.value.param.startswith("steering.methods[0].spans[0]")


NEEDS_IMAGE = compile_spec(
    parse_spec({"methods": [{"method": "vhr"}]}), replace(GEOMETRY, supports_images=True)
)


def image_checked(body: dict[str, Any]) -> None:
    check_prompt(NEEDS_IMAGE, body)


@pytest.mark.parametrize(
    "previous", [{"previous_response_id": "resp_1"}, {"previous_input_messages": [{}]}]
)
def test_the_image_of_an_earlier_turn_may_be_what_is_asked_about(previous: Any) -> None:
    image_checked({"input": "And what is left of it?", **previous})
    with pytest.raises(SteeringError) as caught:
        image_checked({"input": "And what is left of it?"})
    assert caught.value.reason == "E_NO_IMAGE"


def test_an_image_is_found_at_any_depth() -> None:
    def deep(value: Any) -> Any:
        for _ in range(5_000):
            value = {"content": [value]}
        return value

    image_checked({"prompt": "x", "messages": [deep({"type": "image_url"})]})
    image_checked({"input": deep({"input_image": 1})})
    for value in (deep("image"), {"type": deep("image")}):
        with pytest.raises(SteeringError) as caught:
            image_checked({"prompt": "x", "messages": value})
        assert caught.value.reason == "E_NO_IMAGE"


class Handler:
    """Calls the engine in the first step of what it returns, as vLLM's handler does."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def _generate_with_builtin_tools(
        self, request_id: str, engine_input: Any, sampling_params: Any, context: Any
    ) -> AsyncGenerator[Any, None]:
        async for each in self.engine.generate(engine_input, sampling_params, request_id):
            yield each, context


async def test_a_rendered_prompt_is_judged_before_a_response_begins() -> None:
    async def generate(prompt: Any, sampling_params: Any, request_id: str) -> Any:
        yield request_id

    processor = SimpleNamespace(renderer=SimpleNamespace(mm_processor_cache=None), tokenizer=None)
    engine: Any = SimpleNamespace(generate=generate, input_processor=processor)
    handler = Handler(engine)
    check_rendered_prompts(engine, handler)
    params = SimpleNamespace(extra_args={EXTRA_ARG: SteeringRequest(NEEDS_IMAGE, None)})
    asked: dict[str, Any] = {
        "request_id": "r",
        "engine_input": {"type": "token", "prompt_token_ids": [1, 2]},
        "context": "c",
    }
    with pytest.raises(SteeringError) as caught:
        handler._generate_with_builtin_tools(sampling_params=params, **asked)
    assert caught.value.reason == "E_NO_IMAGE"
    plain = handler._generate_with_builtin_tools(
        sampling_params=SimpleNamespace(extra_args=None), **asked
    )
    assert [each async for each in plain] == [("r", "c")]


@pytest.mark.parametrize("item", [CALL, {"type": "item_reference", "id": "i"}, "text", 7])
def test_where_items_are_no_messages_only_tokens_can_be_marked(item: Any) -> None:
    body = {"input": [{"role": "user", "content": "Who sat?"}, item]}
    assert checked(body, {"tokens": [0, 3]}) is None
    for span in ({"text": "Who"}, {"message": 0}):
        with pytest.raises(SteeringError, match="give token positions") as caught:
            checked(body, {"tokens": [0, 3]}, span)
        assert caught.value.reason == "E_UNSUPPORTED"
        assert caught.value.param == "steering.methods[0].spans[1]"


def test_a_chat_and_a_plain_prompt_are_read_as_ever() -> None:
    messages = [{"role": "user", "content": "Who sat?"}]
    assert checked({"messages": messages, "input": "other"}, {"text": "sat"}) == ("Who sat?",)
    assert checked({"prompt": ["Who sat?", "He sat."]}, {"text": "sat"}) is None
    with pytest.raises(SteeringError, match="does not contain 'sat'"):
        checked({"prompt": ["Who sat?", "He ran."]}, {"text": "sat"})
