"""Steering without HTTP: sampling parameters that carry a spec to `vllm.LLM`."""

from __future__ import annotations

from typing import Any, TypeVar

from headway.steering.errors import Reason, SteeringError
from headway.steering.schema import parse_spec

EXTRA_ARG = "headway"
"""Key of `SamplingParams.extra_args` under which a request's steering travels."""

Params = TypeVar("Params")


def sampling_params(params: Params, steering: Any) -> Params:
    """A copy of vLLM `SamplingParams` that steers the request it is used for.

    steering: the same object that an HTTP request carries in its `steering` field. It is checked
    here as far as that is possible without a model; the rest (layers, heads, features) when the
    request is added, by an engine started with `additional_config={"headway": {}}`.

        llm = LLM(model, additional_config={"headway": {}})
        steering = {"methods": [{"method": "vhr", "heads": [[4, 0]], "alpha": 2.0}]}
        llm.generate(prompts, sampling_params(SamplingParams(max_tokens=32), steering))

    Raises SteeringError (a ValueError) for a bad spec. An engine started without Headway refuses
    the request instead of ignoring the spec.
    """
    spec = parse_spec(steering)
    steered: Any = params.clone()  # type: ignore[attr-defined]
    if EXTRA_ARG in (steered.extra_args or {}):
        raise SteeringError(Reason.CONFLICT, "these sampling parameters are already steered")
    steered.extra_args = {**(steered.extra_args or {}), EXTRA_ARG: spec}
    return steered
