"""What saliency passes compute while an engine runs, and the same by autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from headway.server.engine.saliency import SaliencyPass
from tests import sgrs_oracle
from tests.engine.harness import Job


class Seen(NamedTuple):
    """Saliencies of candidates for the token after a position; job: `Job.name`."""

    job: str
    position: int
    candidates: list[int]
    values: list[float]


@contextmanager
def watched_saliencies() -> Iterator[list[Seen]]:
    """All that is computed within the block."""
    seen: list[Seen] = []
    original = SaliencyPass.saliencies

    def saliencies(self: SaliencyPass, chosen: torch.Tensor, candidates: torch.Tensor) -> Any:
        values = original(self, chosen, candidates)
        for row, tokens, found in zip(chosen, candidates, values, strict=True):
            name = self.tape.rows[int(row)].request_id.rsplit("-", 1)[0]
            position = self.tape.rows[int(row)].position
            seen.append(Seen(name, position, tokens.tolist(), found.tolist()))
        return values

    SaliencyPass.saliencies = saliencies  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        SaliencyPass.saliencies = original  # type: ignore[method-assign]


def worst_error(
    model: Any,
    job: Job,
    token_ids: Sequence[int],
    history: torch.Tensor,
    layers: Sequence[int],
    seen: Sequence[Seen],
    **oracle: Any,
) -> float:
    """Largest relative error of a job's saliencies against autograd.

    token_ids: prompt as the engine expands it, and output. history: bool, as long, whether a
    position counts. oracle: its options, and further inputs of the model.
    """
    worst = 0.0
    for each in (each for each in seen if each.job == job.name):
        length = each.position + 1
        expected = sgrs_oracle.saliencies(
            model,
            token_ids[:length],
            each.candidates,
            layers,
            history[:length],
            **oracle,
        ).values
        found = torch.tensor(each.values, dtype=expected.dtype)
        worst = max(worst, float(((found - expected) / expected).abs().max()))
    return worst
