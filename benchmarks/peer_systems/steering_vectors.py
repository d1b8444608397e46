"""The library steering-vectors: residual addition by hooks that it puts on a transformers model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headway.benchmarks.peer_systems.protocol import Answer, Peer, Request
from headway.benchmarks.peer_systems.transformers_model import generate, load_model

PEER = Peer(
    name="steering-vectors",
    module="steering_vectors",
    system="SteeringVectors",
    methods=("caa",),
    package="steering-vectors",
    version="0.12.2",
    shared=True,
    notes="batched generate, padded on the left; one vector and multiplier for the whole batch, "
    "that of the first request",
)


class SteeringVectors:
    """A model that is steered for the length of a batch."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model = load_model(model, dtype)

    def answer(self, requests: Sequence[Request], output_tokens: int) -> list[Answer]:
        """See `protocol.System`; the steering of the first request is that of all."""
        from steering_vectors import SteeringVector

        steering = requests[0]["steering"]
        if steering is None:
            return generate(self.model, requests, output_tokens)
        vector = torch.tensor(steering["vector"], dtype=self.model.dtype)
        with SteeringVector({steering["layer"]: vector}).apply(
            self.model, multiplier=steering["strength"], **steering.get("options", {})
        ):
            return generate(self.model, requests, output_tokens)
