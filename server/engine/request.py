"""How a compiled program reaches the engine: inside the sampling parameters of its request.

The front end puts a `SteeringRequest` (an object, which no JSON body can forge) under `EXTRA_ARG`
into `SamplingParams.extra_args`; the input processor turns it into plain values for the workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from headway.steering import EXTRA_ARG, SteeringProgram

__all__ = ["EXTRA_ARG", "FORGOTTEN_TEXTS", "TEXT", "TEXT_PASS", "SteeringRequest", "attach"]

TEXT, TEXT_PASS, FORGOTTEN_TEXTS = "text", "text_pass", "forgotten_texts"
"""Keys of the plain values, set by the scheduler: which text a request is compared with, which one
it runs, and which are not needed any more."""


@dataclass(frozen=True)
class SteeringRequest:
    """A compiled program on its way to the engine, and the key its report is kept under.

    messages: the text of each chat message, None where the prompt is no chat; emphasised spans
    refer to them.
    """

    program: SteeringProgram
    messages: tuple[str, ...] | None = None
    report_id: str = field(default_factory=lambda: uuid4().hex)

    def __deepcopy__(self, memo: dict[int, Any]) -> SteeringRequest:
        return self


def attach(params: Any, request: SteeringRequest) -> None:
    """Make vLLM `SamplingParams` (changed in place) carry a steering request."""
    params.extra_args = {**(params.extra_args or {}), EXTRA_ARG: request}
