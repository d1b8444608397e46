"""Seam: requests on their way into the engine, over HTTP and offline alike.

vLLM symbols relied on: `vllm.v1.engine.input_processor.InputProcessor.process_inputs` (every
request passes it in the front end; returns an `EngineCoreRequest` with `sampling_params`), its
`tokenizer`, and `vllm.exceptions.VLLMClientError`, which vLLM passes on to the client's answer.

Here a steering request meets its prompt and becomes plain values for the workers and the prefix
cache; and here, behind every endpoint, a request that smuggles steering past our own routes is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMClientError

from headway.server.engine.cache_key import cache_keys
from headway.server.engine.config import is_enabled, refuse_unsupported, unsupported_request
from headway.server.engine.geometry import geometry_of
from headway.server.engine.prompt import Prompt, read_prompt
from headway.server.engine.request import EXTRA_ARG, SteeringRequest
from headway.steering import Reason, SteeringError, SteeringSpec, compile_spec
from headway.steering.wire import encode_facts, encode_program

CARRIAGE_KEY = "steering"
"""Key of `vllm_xargs` that our routes consume; still there, an endpoint passed it on unread."""


class EngineRefusal(SteeringError, VLLMClientError):
    """A SteeringError that vLLM takes for the client's fault and not for its own failure."""


def install() -> None:
    """Wrap `InputProcessor.process_inputs`; calling it again changes nothing."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not getattr(params, "extra_args", None):
            return original(self, request_id, prompt, params, *args, **kwargs)
        with refusals():
            steering = take_steering(params.extra_args, self.vllm_config)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if EXTRA_ARG in params.extra_args:
            with refusals():
                carry(request, steering, self)
        return request

    InputProcessor.process_inputs = process_inputs


@contextmanager
def refusals() -> Iterator[None]:
    """Turn a SteeringError into one that vLLM passes on to the client."""
    try:
        yield
    except SteeringError as error:
        raise EngineRefusal(error.reason, error.message, error.param) from error


def take_steering(extra_args: dict[str, Any], vllm_config: Any) -> SteeringRequest | None:
    """The compiled steering of a request, None where it asks for none.

    Raises SteeringError where steering was asked for in a way that would not be carried out.
    """
    if is_enabled(vllm_config) and CARRIAGE_KEY in extra_args:
        message = "this endpoint cannot steer; the request would have been served unsteered"
        raise SteeringError(Reason.UNSUPPORTED, message, f"vllm_xargs.{CARRIAGE_KEY}")
    value = extra_args.get(EXTRA_ARG)
    if value is None:
        return None
    if not isinstance(value, SteeringRequest | SteeringSpec):
        message = f'the key "{EXTRA_ARG}" is reserved; steer through the `steering` field'
        raise SteeringError(Reason.BAD_PARAM, message, f"vllm_xargs.{EXTRA_ARG}")
    if not is_enabled(vllm_config):
        message = 'this engine was started without additional_config={"headway": {}}'
        raise SteeringError(Reason.UNSUPPORTED, message)
    reason = unsupported_request(vllm_config)
    if reason:
        raise SteeringError(Reason.UNSUPPORTED, reason)
    if isinstance(value, SteeringSpec):
        value = SteeringRequest(compile_spec(value, geometry_of(vllm_config)))
    refuse_unsupported(value.program, vllm_config)
    return value


def carry(request: Any, steering: SteeringRequest | None, input_processor: Any) -> None:
    """Put steering, as plain values, into an `EngineCoreRequest` (changed in place).

    Raises SteeringError where the prompt is not one that the program can steer.
    """
    params = request.sampling_params
    extra_args = {key: value for key, value in params.extra_args.items() if key != EXTRA_ARG}
    if steering is not None:
        program = steering.program
        prompt = Prompt.of_request(request)
        facts = read_prompt(prompt, steering, input_processor)
        if not program.is_identity:
            # Long prompts take a while to digest, and only a choice of heads depends on all of one.
            digest = prompt.digest if program.head_selection is not None else ""
            keys = cache_keys(program, facts, digest)
            by_prompt = len(keys) > 1 or facts.image_spans or facts.marks or program.saliency
            if request.resumable and by_prompt:
                message = "edits that depend on the prompt cannot steer a resumable request"
                raise SteeringError(Reason.UNSUPPORTED, message)
            extra_args[EXTRA_ARG] = {
                "report_id": steering.report_id,
                **encode_program(program),
                "facts": encode_facts(facts),
                "cache_keys": keys,
            }
    params.extra_args = extra_args or None
