"""SGRS as it was published: what judging the candidates of a token costs (`sgrs_published.py`).

It generates nothing here. Its time for a token is that of judging one candidate at the mean context
of an answer, times the candidates that Headway's requests drew for a token in the same round.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headway.benchmarks.peer_systems.protocol import Answer, Peer
from headway.benchmarks.sgrs_published import PublishedProcess

PEER = Peer(
    name="SGRS as published",
    module="published_sgrs",
    system="PublishedSGRS",
    methods=("sgrs",),
    checked=False,
    notes="one candidate after the other, a forward and a backward pass each without a cache; "
    "timed on one and multiplied by the candidates that Headway drew; `headway bench sgrs` "
    "measures it more closely",
)


class PublishedSGRS:
    """The procedure on the prompts and answers of Headway's own requests. Raises EngineError."""

    def __init__(self, model: Path, dtype: str) -> None:
        self.published = PublishedProcess(model, dtype)
        self.published.timed([0, 0], 0, [0], 1)  # so that it loads while nothing is measured

    def seconds_per_token(self, prompt: Sequence[int], answers: Sequence[Answer]) -> float:
        """For the first of these answers at half its length. Raises EngineError.

        answers: of requests with `sgrs`, the first of them to `prompt`.
        """
        tokens = answers[0]["token_ids"]
        half = len(tokens) // 2
        context = [*prompt, *tokens[:half]]
        layers = answers[0]["layers"]
        _, seconds = self.published.timed(context, tokens[half], layers, len(prompt))
        draws = sum(each["draws"] for each in answers)
        return seconds * draws / sum(len(each["token_ids"]) for each in answers)

    def close(self) -> None:
        """End the process."""
        self.published.close()
