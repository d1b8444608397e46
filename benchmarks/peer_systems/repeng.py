"""The library repeng: residual addition by modules that it puts around the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headway.benchmarks.peer_systems.protocol import Answer, Peer, Request
from headway.benchmarks.peer_systems.transformers_model import generate, load_model

PEER = Peer(
    name="repeng",
    module="repeng",
    system="Repeng",
    methods=("caa",),
    package="repeng",
    version="0.4.0",
    also=("transformers>=5,<6",),
    notes="batched generate, padded on the left; a control vector of its own for each row, through "
    "set_raw_control, which takes one of the shape [batch, 1, hidden_size]",
)


class Repeng:
    """A model whose layers are wrapped for the length of a batch."""

    def __init__(self, model: str, dtype: str) -> None:
        self.model = load_model(model, dtype)

    def answer(self, requests: Sequence[Request], output_tokens: int) -> list[Answer]:
        """See `protocol.System`; all steered requests of a batch name the same layer."""
        from repeng import ControlModel

        asked = [(row, each["steering"]) for row, each in enumerate(requests) if each["steering"]]
        if not asked:
            return generate(self.model, requests, output_tokens)
        layer, options = asked[0][1]["layer"], asked[0][1].get("options", {})
        control = torch.zeros(len(requests), 1, self.model.config.hidden_size)
        for row, steering in asked:
            control[row, 0] = steering["strength"] * torch.tensor(steering["vector"])
        wrapped = ControlModel(self.model, [layer])
        try:
            wrapped.set_raw_control({layer: control.to(self.model.dtype)}, **options)
            return generate(wrapped, requests, output_tokens)
        finally:
            wrapped.unwrap()
