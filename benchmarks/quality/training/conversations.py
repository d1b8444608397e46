"""Many questions about one picture in one sequence.

A sequence begins with what all conversations about a picture share, the user's turn up to and
including the image tokens. Each question with its answer is a branch: its positions continue the
prefix, and it attends to the prefix and to itself. The model thus computes what it would for every
conversation alone, without processing the picture again for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from headway.benchmarks.quality.scenes import CAPTION_PROMPT, OBJECTS, caption, question
from headway.server.models.demo_vlm import END_TOKEN, IMAGE_TOKEN, TOKENS_PER_IMAGE

IGNORED = -100
"""The target where there is nothing to learn; torch's cross entropy leaves it out."""
PADDED_TO = 8
POSITIVE, NEGATIVE = "Yes.", "No."
POSITIVE_QUESTIONS, NEGATIVE_QUESTIONS = 2, 3
"""Most questions about objects that are there, and the number of those that are not."""

PREFIX, PADDING = 0, -1
"""The segments of the tokens that are in no branch; branches are counted from 1."""


@dataclass(frozen=True)
class Packed:
    """A batch of sequences of equal, padded length.

    input_ids, positions and targets are int64 `(pictures, length)`; targets[i, t] is the token that
    is to follow token t, or IGNORED. attention: bool `(pictures, 1, length, length)`, True where
    a query (row) sees a key. answers[i] are the places in sequence i after which the answers of its
    branches begin.
    """

    input_ids: Tensor
    positions: Tensor
    attention: Tensor
    targets: Tensor
    answers: list[list[int]]


class Conversations:
    """Tokenises questions and answers about pictures as the demo model's chat template does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        user = tokenizer("<|im_start|>user\n").input_ids
        self.prefix = user + [IMAGE_TOKEN] * TOKENS_PER_IMAGE
        self.image_slice = slice(len(user), len(self.prefix))
        self.turn = tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids
        self.yes, self.no = (tokenizer(word).input_ids[0] for word in (POSITIVE, NEGATIVE))

    def pack(self, pictures: Sequence[Sequence[tuple[str, str]]]) -> Packed:
        """One sequence for the (question, answer) pairs of each picture."""
        sequences = [self._sequence(branches) for branches in pictures]
        longest = max(len(sequence.input_ids) for sequence in sequences)
        length = -(-longest // PADDED_TO) * PADDED_TO

        def padded(rows: Sequence[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        segments = padded([sequence.segments for sequence in sequences], PADDING)
        queries, keys = segments[:, :, None], segments[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return Packed(
            input_ids=padded([sequence.input_ids for sequence in sequences], END_TOKEN),
            positions=padded([sequence.positions for sequence in sequences], 0),
            attention=(((queries == keys) | (keys == PREFIX)) & causal)[:, None],
            targets=padded([sequence.targets for sequence in sequences], IGNORED),
            answers=[sequence.answers for sequence in sequences],
        )

    def _sequence(self, branches: Sequence[tuple[str, str]]) -> _Sequence:
        prefix = len(self.prefix)
        sequence = _Sequence(
            list(self.prefix), list(range(prefix)), [PREFIX] * prefix, [IGNORED] * prefix, []
        )
        for segment, (asked, answered) in enumerate(branches, start=1):
            prompt = self.tokenizer(asked).input_ids + self.turn
            answer = self.tokenizer(answered).input_ids + [END_TOKEN]
            sequence.answers.append(len(sequence.input_ids) + len(prompt) - 1)
            sequence.input_ids += prompt + answer
            sequence.positions += range(prefix, prefix + len(prompt) + len(answer))
            sequence.segments += [segment] * (len(prompt) + len(answer))
            sequence.targets += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
        return sequence


@dataclass
class _Sequence:
    input_ids: list[int]
    positions: list[int]
    segments: list[int]
    targets: list[int]
    answers: list[int]


def lesson(objects: Sequence[str], generator: Random) -> list[tuple[str, str]]:
    """What is trained on one picture: its caption, and some yes/no questions."""
    absent = [name for name in OBJECTS if name not in objects]
    present = generator.sample(list(objects), min(POSITIVE_QUESTIONS, len(objects)))
    return [
        (CAPTION_PROMPT, caption(objects)),
        *((question(name), POSITIVE) for name in present),
        *((question(name), NEGATIVE) for name in generator.sample(absent, NEGATIVE_QUESTIONS)),
    ]
