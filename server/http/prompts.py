"""What a request's prompt must hold for its steering, checked before a stream has begun.

The engine's input processor checks it once more, for every endpoint and offline; but a stream of
vLLM's handlers gets there when it has answered 200.

vLLM symbols relied on: `EngineClient.generate`, called by the handlers with the rendered prompt and
the sampling parameters, and `EngineClient.input_processor`; of the handler of responses
`_generate_with_builtin_tools`, which does the same, but not before its first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from headway.server.engine.prompt import PICTURES, Prompt, read_prompt, require_image
from headway.server.engine.request import EXTRA_ARG, SteeringRequest
from headway.steering import Reason, SteeringError, SteeringProgram
from headway.steering.spans import check_spans, message_texts

PROMPT_FIELDS = ("messages", "prompt", "input", "prompt_embeds")
"""Where a body holds its prompt; one without any is a dry run of the steering alone."""

PREVIOUS_FIELDS = ("previous_response_id", "previous_input_messages")
"""What a response goes on from, where there may be images that the body does not show."""


def check_rendered_prompts(engine_client: Any, responses: Any = None) -> None:
    """Have `engine_client.generate` (changed on this object) raise SteeringError at the call.

    It is an asynchronous generator, whose first step would be the first to look at the prompt. So
    is what calls it in `responses`, the handler of responses, which is changed likewise.
    """
    generate_original = engine_client.generate

    @wraps(generate_original)
    def generate(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        _check_rendered(engine_client, prompt, sampling_params)
        return generate_original(prompt, sampling_params, *args, **kwargs)

    engine_client.generate = generate
    if responses is None:
        return
    turns_original = responses._generate_with_builtin_tools

    @wraps(turns_original)
    def turns(request_id: str, engine_input: Any, sampling_params: Any, **kwargs: Any) -> Any:
        _check_rendered(engine_client, engine_input, sampling_params)
        return turns_original(request_id, engine_input, sampling_params, **kwargs)

    responses._generate_with_builtin_tools = turns


def _check_rendered(engine_client: Any, prompt: Any, sampling_params: Any) -> None:
    steering = (getattr(sampling_params, "extra_args", None) or {}).get(EXTRA_ARG)
    if isinstance(steering, SteeringRequest):
        rendered = Prompt.of_input(prompt)
        if rendered is not None:
            read_prompt(rendered, steering, engine_client.input_processor)


def check_prompt(program: SteeringProgram, body: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Check a JSON body against its program; the text of each chat message, None if it is no chat.

    The messages of a response are its own: its instructions and its input, without those of the
    response that it goes on from.

    Raises SteeringError: E_NO_IMAGE for a program that needs an image where there is none,
    E_BAD_PARAM for a span that no message holds, E_UNSUPPORTED for one of a message where the
    input of a response does not tell what the messages are.
    """
    if not any(body.get(name) is not None for name in PROMPT_FIELDS):
        return None
    if not any(body.get(name) for name in PREVIOUS_FIELDS):
        require_image(program, _has_picture(body.get("messages") or body.get("input")))
    messages = body.get("messages")
    is_response = messages is None and body.get("input") is not None
    if is_response:
        messages = response_messages(body)
    texts = None
    if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
        texts = tuple(message_texts(messages))
    if program.marks and is_response and texts is None:
        _refuse_messages(program)
    if program.marks:
        check_spans(program.marks, texts, program.marks_param)
        if texts is None:
            _check_texts(program, body)
    return texts


def response_messages(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The chat messages that vLLM makes of the instructions and the input of a response.

    None where an item of the input is no message: vLLM merges those of tools and of reasoning with
    others. Of an assistant's message it takes the first part.
    """
    given, instructions = body["input"], body.get("instructions")
    messages = [{"content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"content": given}]
    for item in given if isinstance(given, list) else [None]:
        if not isinstance(item, dict) or "role" not in item:
            return None
        if item.get("type") not in (None, "message"):
            return None
        content = item.get("content")
        if item["role"] == "assistant" and isinstance(content, list):
            content = content[:1]
        messages.append({"content": content})
    return messages


def _refuse_messages(program: SteeringProgram) -> None:
    """Raise SteeringError(E_UNSUPPORTED) for a span that refers to chat messages."""
    for index, selector in enumerate(program.marks):
        if selector.tokens is None:
            message = (
                "the input has items that are no messages; spans of its messages cannot be told, "
                "give token positions instead"
            )
            raise SteeringError(Reason.UNSUPPORTED, message, f"{program.marks_param}[{index}]")


def _check_texts(program: SteeringProgram, body: Mapping[str, Any]) -> None:
    """Every text to mark must occur in each prompt of a body that is no chat, if it has texts."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    texts = [text for text in prompts if isinstance(text, str)]
    for index, selector in enumerate(program.marks):
        if selector.text is not None and not all(selector.text in text for text in texts):
            message = f"the prompt does not contain {selector.text[:60]!r}"
            param = f"{program.marks_param}[{index}].text"
            raise SteeringError(Reason.BAD_PARAM, message, param)


def _has_picture(value: Any) -> bool:
    """Whether messages, or the input of a response, contain an image or a video part.

    Without recursion: no model has validated what another endpoint ignores, however deep it is.
    """
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            names = [each for each in (part.get("type"), *part) if isinstance(each, str)]
            if any(picture in name for name in names for picture in PICTURES):
                return True
            pending.append(part.get("content"))
    return False
