"""Seam: the random streams of requests with a seed, while their prompt is computed in parts.

vLLM symbols relied on: of the runner `input_batch.generators` (by index in the batch, the dict that
its sampling metadata holds too) and `discard_request_mask.np`.

vLLM samples from every row of a batch, also where a prompt goes on in the next step, and takes the
stream of such a request back afterwards. It does so with `Generator.set_offset`, which raises for a
generator on CPU and with it ends the engine. Without a stream of its own such a row is drawn from
the common one, and there is nothing to take back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def only_streams_in_use(runner: Any) -> Iterator[None]:
    """Leave out of a step's sampling the streams of requests whose token is thrown away."""
    generators = runner.input_batch.generators
    discarded = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
    kept = {int(index): generators.pop(int(index), None) for index in discarded if generators}
    try:
        yield
    finally:
        generators.update({index: each for index, each in kept.items() if each is not None})
