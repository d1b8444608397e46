"""Finds the requests whose edits made their numbers useless: NaN, infinite, or lost to overflow.

What is looked at is the row that a token is sampled from as it enters the LM head, one number a
row, of steps with steered requests only. It is enough: a row that is not finite makes the keys and
values behind it so, and with them every later row of its sequence in the same step. Without a look
vLLM would sample some token from it and say nothing.

A row of zeros counts too: that is what a norm makes of a row whose square overflows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from headway.server.engine.scheduler import FAILED_REQUESTS
from headway.server.engine.steering_state import SteeringState

logger = logging.getLogger(__name__)

STAGE = "nonfinite"
"""The stage at which such a request fails."""

MESSAGE = "what the model computed is not finite any more; an edit overflows, or is too strong"


def magnitudes(hidden_states: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each row, NaN for one that holds NaN: [num_rows]."""
    return hidden_states.abs().amax(dim=-1)


def is_lost(found: torch.Tensor) -> torch.Tensor:
    """Whether nothing can be sampled from a row, by its magnitude: bool [num_rows]."""
    return ~((found > 0) & (found < math.inf))


def lost(found: torch.Tensor) -> list[int]:
    """The rows of which that is so."""
    return torch.nonzero(is_lost(found)).flatten().tolist()


@torch.inference_mode()
def fail_lost_rows(
    steering: SteeringState,
    request_ids: Sequence[str],
    hidden_states: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """Fail the steered requests of a step whose row is lost; on CPU, before sampling.

    hidden_states: [num_reqs, hidden_size], in the order of request_ids. logits: [num_reqs,
    vocabulary], zeroed where a request fails, so that no sampler has to do with NaN.
    """
    if not steering.requests:
        return
    with steering.guard(STAGE):
        for index in lost(magnitudes(hidden_states)):
            if request_ids[index] in steering.requests:
                logits[index] = 0
                with steering.guard(STAGE, [request_ids[index]]):
                    raise FloatingPointError(MESSAGE)


class PendingCheck:
    """The same where the host must not wait for the device: read when the sampled tokens are.

    hidden_states: [num_tokens, hidden_size], row_slots: int32 [>= num_tokens], >= 0 for rows that
    are steered, on the device; rows: of each of request_ids the row that its token is sampled from.
    Made before the runner samples, so that what is copied here has arrived when the sampled tokens
    have. A steered row that is lost is zeroed: of NaN a sampler may take a token that does not
    exist, and the next step would look up its embedding.
    """

    def __init__(
        self,
        steering: SteeringState,
        request_ids: Sequence[str],
        hidden_states: torch.Tensor,
        rows: torch.Tensor,
        row_slots: torch.Tensor,
    ) -> None:
        # Taken now: the tokens are read by another thread, when the request may be gone.
        self._steered = {
            index: (request_id, steering.reports.of(steering.requests[request_id].report_id))
            for index, request_id in enumerate(request_ids)
            if request_id in steering.requests
        }
        with torch.inference_mode():
            sampled = hidden_states[rows]
            found = magnitudes(sampled)
            spoiled = is_lost(found) & (row_slots[rows] >= 0)
            hidden_states[rows] = sampled.masked_fill(spoiled[:, None], 0)
            self._found = found.to("cpu", non_blocking=True)

    def failed(self) -> tuple[str, ...]:
        """The requests whose row is lost, their reports saying so; after the copy has arrived."""
        ids = []
        for index in lost(self._found):
            if index in self._steered:
                request_id, report = self._steered[index]
                report.fail(STAGE, FloatingPointError(MESSAGE))
                logger.error("steering failed for request %s at %s: %s", request_id, STAGE, MESSAGE)
                ids.append(request_id)
        return tuple(ids)

    def ride(self, output: Any) -> None:
        """Have a vLLM `AsyncOutput` (changed in place) list them in `FAILED_REQUESTS`."""
        get_output = output.get_output

        def checked() -> Any:
            result = get_output()
            failed = self.failed()
            if failed:
                known = getattr(result, FAILED_REQUESTS, ())
                setattr(result, FAILED_REQUESTS, (*known, *failed))
            return result

        output.get_output = checked
