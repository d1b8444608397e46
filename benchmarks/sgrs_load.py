"""What is asked of the server by `headway bench sgrs`, and what an answer must say of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from headway.benchmarks.completions import Completion, complete
from headway.benchmarks.quality.client import UnsteeredAnswer
from headway.benchmarks.quality.neutral_text import PARAGRAPHS

BATCH = 8
"""As many as `headway serve` lets use SGRS at a time by default."""


@dataclass(frozen=True)
class Arm:
    """So many requests made at the same time; steering: of each, None for unsteered ones.

    judges: whether candidates are drawn and judged.
    """

    name: str
    steering: dict[str, Any] | None = None
    num_requests: int = 1
    judges: bool = False


GATE = {"methods": [{"method": "sgrs"}]}
READOUT = {"report": {"saliency": True}}
UNSTEERED = Arm("unsteered, alone")
SGRS = Arm("SGRS, alone", GATE, judges=True)
READ = Arm("saliencies read, alone", READOUT)
UNSTEERED_BATCH = Arm(f"unsteered, {BATCH} together", num_requests=BATCH)
SGRS_BATCH = Arm(f"SGRS, {BATCH} together", GATE, BATCH, judges=True)
ARMS = (UNSTEERED, SGRS, READ, UNSTEERED_BATCH, SGRS_BATCH)


@dataclass(frozen=True)
class Judged:
    """A token that SGRS took: the tokens before it, its layers, and its saliency by Headway."""

    context: list[int]
    prompt_len: int
    token: int
    layers: list[int]
    saliency: float


class Requests:
    """Completions of one server. Each prompt is prose, another for each request of a batch.

    context: the mean number of tokens that an output token is predicted from.
    """

    def __init__(self, url: str, model: Path, context: int, output_tokens: int, seed: int) -> None:
        self.url = url
        self.model = str(model)
        self.context = context
        self.output_tokens = output_tokens
        self.seed = seed
        self.prompts = prompts(model, context - output_tokens // 2, seed)

    def run(self, arm: Arm, round_index: int) -> list[Completion]:
        """The answers to the requests of an arm; other prompts and draws in other rounds.

        Raises EndpointError, and UnsteeredAnswer for an answer that does not say what it should.
        """
        answers = complete(
            self.url, [self._body(arm, round_index + i) for i in range(arm.num_requests)]
        )
        for answer in answers:
            check(arm, answer)
        return answers

    def judged(self) -> Judged:
        """The token after `context` tokens of a request with SGRS. Raises as `run` does."""
        arm = Arm("SGRS, reported", {**GATE, "report": "full"}, judges=True)
        (answer,) = self.run(arm, 0)
        assert answer.steering is not None
        index = self.context - len(self.prompts[0])
        (tokens,) = answer.steering["saliency"]
        if tokens[index]["token_id"] != answer.token_ids[index]:
            raise UnsteeredAnswer("the report is of other tokens than those of the answer")
        return Judged(
            self.prompts[0] + answer.token_ids[:index],
            len(self.prompts[0]),
            answer.token_ids[index],
            answer.steering["methods"][0]["layers"],
            tokens[index]["saliency"],
        )

    def _body(self, arm: Arm, index: int) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": self.prompts[index % len(self.prompts)],
            "max_tokens": self.output_tokens,
            "temperature": 1.0,
            "seed": self.seed + index,
        }
        return body if arm.steering is None else {**body, "steering": arm.steering}


def prompts(model: Path, num_tokens: int, seed: int) -> list[list[int]]:
    """A prompt of this many tokens for each request of a batch: paragraphs in random order."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    paragraphs = [tokenizer.encode(each, add_special_tokens=False).ids for each in PARAGRAPHS]
    found = []
    for index in range(BATCH):
        draw = random.Random(f"{seed} {index}")
        tokens: list[int] = []
        while len(tokens) < num_tokens:
            tokens += chain.from_iterable(draw.sample(paragraphs, len(paragraphs)))
        found.append(tokens[:num_tokens])
    return found


def check(arm: Arm, answer: Completion) -> None:
    """Raise UnsteeredAnswer unless an answer says that it was steered as the arm asks, or not."""
    steering = answer.steering
    if arm.steering is None:
        if steering is not None:
            raise UnsteeredAnswer(f"{arm.name}: a request that asks for nothing was steered")
        return
    number = len(answer.token_ids)
    if arm.judges:
        draws = steering["methods"][0]["draws"] if steering else 0
        if draws < number:
            raise UnsteeredAnswer(f"{arm.name}: {draws} candidates drawn for {number} tokens")
        return
    read = steering["saliency"] if steering else []
    if [len(tokens) for tokens in read] != [number]:
        raise UnsteeredAnswer(f"{arm.name}: not every one of {number} tokens has a saliency")


def draws_per_token(answers: Sequence[Completion]) -> float:
    """How many candidates SGRS drew for a token, the mean over the tokens of these answers."""
    draws = sum(each.steering["methods"][0]["draws"] for each in answers if each.steering)
    return draws / sum(len(each.token_ids) for each in answers)
