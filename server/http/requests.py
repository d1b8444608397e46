"""vLLM's request models with a `steering` field.

vLLM symbols relied on: `ChatCompletionRequest`, `CompletionRequest`, `ResponsesRequest` and their
`to_sampling_params`, which vLLM's serving handlers call once for every prompt.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, PrivateAttr, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import OpenAIBaseModel
from vllm.sampling_params import SamplingParams

from headway.server.engine.request import SteeringRequest, attach
from headway.server.http.carriage import take_carriages
from headway.server.http.openapi import SPEC_SCHEMA


class Steerable(OpenAIBaseModel):
    """What the three steerable requests have in common.

    After validation `steering` is None or a tuple of `Carriage`; it is judged by the route, so
    that errors have our shape and paths.
    """

    steering: Any = Field(
        default=None,
        description="How to steer this request; see GET /v1/steering/capabilities.",
        json_schema_extra=SPEC_SCHEMA,
    )
    _steering_request: SteeringRequest | None = PrivateAttr(default=None)
    _reached_engine: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _collect_carriages(cls, data: Any) -> Any:
        if isinstance(data, dict) and ("steering" in data or data.get("vllm_xargs")):
            carriages, rest = take_carriages(data)
            return {**rest, "steering": carriages or None}
        return data

    def carry(self, request: SteeringRequest) -> None:
        """Steer every prompt of this request."""
        self._steering_request = request

    @property
    def reached_engine(self) -> bool:
        """Whether sampling parameters that carry the steering were handed out."""
        return self._reached_engine

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's sampling parameters, which carry the steering if there is one."""
        params: SamplingParams = super().to_sampling_params(*args, **kwargs)
        if self._steering_request is not None:
            attach(params, self._steering_request)
            self._reached_engine = True
        return params


class SteerableChatCompletionRequest(Steerable, ChatCompletionRequest):
    """POST /v1/chat/completions."""


class SteerableCompletionRequest(Steerable, CompletionRequest):
    """POST /v1/completions."""


class SteerableResponsesRequest(Steerable, ResponsesRequest):
    """POST /v1/responses."""
