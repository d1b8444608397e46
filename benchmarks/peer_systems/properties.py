"""What must be true of a steered system whatever its speed, tried on the running system.

Answers are greedy; two are equal if their tokens are, and the log-probabilities of their first
token within `TOLERANCE`, which in float32 is far above the difference between two batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headway.benchmarks.peer_systems.headway_server import HeadwayServer
from headway.benchmarks.peer_systems.loads import (
    FROM_THE_SECOND_TOKEN,
    impossible,
    without_strength,
)
from headway.benchmarks.peer_systems.protocol import Answer, Request, System
from headway.benchmarks.peer_systems.worker_process import Refused
from headway.benchmarks.quality.client import EndpointError

HOLDS, FAILS = "holds", "fails"
NOT_APPLICABLE, NOT_TESTED = "not applicable", "not tested"
PROPERTIES = ("prefix_cache", "batch_mates", "zero_strength", "bad_spec", "first_token")
TOLERANCE = 1e-2
OUTPUT_TOKENS = 8
TRIED = 4
"""Requests of a batch."""


class Trial:
    """One system and one method under test.

    prompts: of the batch, `TRIED` or more; long_prompt: of more than two blocks of the prefix
    cache. steered: the steering of each request of a batch. shared, checked: as in `protocol.Peer`.
    `reasons` says why something was not tested, and what failed.
    """

    def __init__(
        self,
        system: System,
        prompts: Sequence[list[int]],
        long_prompt: list[int],
        steered: Sequence[dict[str, Any]],
        shared: bool = False,
        checked: bool = True,
    ) -> None:
        self.system = system
        self.prompts = prompts
        self.long_prompt = long_prompt
        self.steered = steered
        self.shared = shared
        self.checked = checked
        self.reasons: list[str] = []

    def results(self) -> dict[str, str]:
        """Each property, and whether it holds."""
        tests: dict[str, Callable[[], str]] = {
            "prefix_cache": self.prefix_cache,
            "batch_mates": self.batch_mates,
            "zero_strength": self.zero_strength,
            "bad_spec": self.bad_spec,
            "first_token": self.first_token,
        }
        return {name: tests[name]() for name in PROPERTIES}

    def prefix_cache(self) -> str:
        """An unsteered answer does not depend on steered ones to the same prompt before it."""
        if not isinstance(self.system, HeadwayServer):
            return NOT_APPLICABLE
        plain, steered = request(self.long_prompt), request(self.long_prompt, self.steered[0])
        salt = f"alone {self.steered[0]['method']}"
        (alone,) = self.system.answer([plain], OUTPUT_TOKENS, salt=salt)
        shared = f"after {self.steered[0]['method']}"
        self.system.answer([steered], OUTPUT_TOKENS, salt=shared)
        (after,) = self.system.answer([plain], OUTPUT_TOKENS, salt=shared)
        (again,) = self.system.answer([plain], OUTPUT_TOKENS, salt=shared)
        if not again.get("cached_tokens"):
            self.reasons.append("prefix_cache: nothing of a repeated prompt came from the cache")
            return NOT_TESTED
        return HOLDS if equal(alone, after) and equal(alone, again) else FAILS

    def batch_mates(self) -> str:
        """An unsteered answer is the same alone and beside steered ones."""
        if self.shared:
            return NOT_APPLICABLE
        plain = request(self.prompts[0])
        (alone,) = self.system.answer([plain], OUTPUT_TOKENS)
        mates = list(map(request, self.prompts[1:TRIED], self.steered[1:TRIED]))
        beside = self.system.answer([mates[0], plain, *mates[1:]], OUTPUT_TOKENS)[1]
        return HOLDS if equal(alone, beside) else FAILS

    def zero_strength(self) -> str:
        """Steering of no strength gives the unsteered answer."""
        nothing = request(self.prompts[0], without_strength(self.steered[0]))
        (zero,) = self.system.answer([nothing], OUTPUT_TOKENS)
        (plain,) = self.system.answer([request(self.prompts[0])], OUTPUT_TOKENS)
        return HOLDS if equal(zero, plain) else FAILS

    def bad_spec(self) -> str:
        """A layer and an option that do not exist are refused."""
        if not self.checked:
            return NOT_APPLICABLE
        for wrong in impossible(self.steered[0]):
            try:
                self.system.answer([request(self.prompts[0], wrong)], OUTPUT_TOKENS)
            except (Refused, EndpointError):
                continue
            what = "an unknown option" if "options" in wrong else "a layer that does not exist"
            self.reasons.append(f"bad_spec: {what} was answered")
            return FAILS
        return HOLDS

    def first_token(self) -> str:
        """The distribution of the first output token is already steered."""
        if self.steered[0]["method"] in FROM_THE_SECOND_TOKEN:
            return NOT_APPLICABLE
        (steered,) = self.system.answer([request(self.prompts[0], self.steered[0])], 1)
        (plain,) = self.system.answer([request(self.prompts[0])], 1)
        return FAILS if close(steered["first"], plain["first"]) else HOLDS


def request(tokens: list[int], steering: dict[str, Any] | None = None) -> Request:
    """A request; unsteered by default."""
    return {"tokens": tokens, "steering": steering}


def equal(one: Answer, other: Answer) -> bool:
    """Whether two answers are the same."""
    return one["token_ids"] == other["token_ids"] and close(one["first"], other["first"])


def close(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two distributions of a first token are the same, as far as both are known."""
    common = one.keys() & other.keys()
    return bool(common) and all(abs(one[each] - other[each]) < TOLERANCE for each in common)
