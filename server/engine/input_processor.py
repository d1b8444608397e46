"""Seam: requests on their way into the engine, over HTTP and offline alike.

vLLM symbols relied on: `vllm.v1.engine.input_processor.InputProcessor.process_inputs` (every
request passes it in the front end, returns an `EngineCoreRequest` with `sampling_params` and
`cache_salt`) and `vllm.exceptions.VLLMClientError`, which vLLM passes on to the client's answer.

Here a steering request becomes plain values for the workers and its prefix-cache salt is set; and
here, behind every endpoint, a request that smuggles steering past our own routes is refused.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.exceptions import VLLMClientError

from headway.server.engine.cache_key import cache_salt
from headway.server.engine.config import is_enabled, unsupported_request
from headway.server.engine.geometry import geometry_of
from headway.server.engine.request import EXTRA_ARG, SteeringRequest
from headway.steering import Reason, SteeringError, SteeringSpec, compile_spec
from headway.steering.wire import encode_program

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
        try:
            steering = take_steering(params.extra_args, self.vllm_config)
        except SteeringError as error:
            raise EngineRefusal(error.reason, error.message, error.param) from error
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if EXTRA_ARG in params.extra_args:
            carry(request, steering)
        return request

    InputProcessor.process_inputs = process_inputs


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
        return SteeringRequest(compile_spec(value, geometry_of(vllm_config)))
    return value


def carry(request: Any, steering: SteeringRequest | None) -> None:
    """Put steering, as plain values, into an `EngineCoreRequest` (changed in place)."""
    params = request.sampling_params
    extra_args = {key: value for key, value in params.extra_args.items() if key != EXTRA_ARG}
    if steering is not None and not steering.program.is_identity:
        extra_args[EXTRA_ARG] = {
            "report_id": steering.report_id,
            **encode_program(steering.program),
        }
        request.cache_salt = cache_salt(request.cache_salt, steering.program)
    params.extra_args = extra_args or None
