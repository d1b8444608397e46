"""The sampling gate of one sequence: which of the candidates for a position is let through.

Saliency-Guided Rejection Sampling, arXiv 2601.20279; the rule is that of `SamplingGate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from headway.steering.program import Readout, SamplingGate, SteeringProgram

MAX_TOKENS = 1 << 16
"""Most tokens of a sequence that its report lists."""


@dataclass(frozen=True)
class Accepted:
    """What was taken at a position; saliency: None where there is no history to look at."""

    position: int
    token_id: int
    saliency: float | None
    threshold: float | None
    draws: int
    refusals: int
    fallback: bool

    def as_list(self) -> list[Any]:
        """Plain values, in the order of the fields."""
        return [*list(vars(self).values())[:-1], int(self.fallback)]


@dataclass
class Gate:
    """What a sequence has let through so far, by position, whatever else runs beside it.

    rule: None where saliencies are read and nothing is refused. seed: of its draws; a draw is a
    function of seed and position alone, so that preemption and batch mates change nothing.
    end_tokens: taken whenever they are drawn.
    """

    rule: SamplingGate | None
    seed: int
    end_tokens: frozenset[int] = frozenset()
    accepted: list[Accepted] = field(default_factory=list)

    @classmethod
    def of(cls, rule: SamplingGate | None, seed: int | None, end_tokens: Iterable[int]) -> Gate:
        """A new gate; seed: None for any."""
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        return cls(rule, seed % (1 << 64), frozenset(end_tokens))

    def order(self, probabilities: np.ndarray, position: int, greedy: bool) -> list[int]:
        """Indices of the candidates in the order in which they are drawn.

        probabilities: float [num_candidates], descending; those of 0 are no candidates. Drawn
        without replacement; greedy: taken in the order of their probabilities instead.
        """
        left = [index for index, each in enumerate(probabilities) if each > 0]
        if greedy:
            return left
        # As arrays, for seeds beyond 2^63; the generator itself counts up in the first word.
        key, counter = np.zeros(2, np.uint64), np.zeros(4, np.uint64)
        key[0], counter[1] = self.seed, position
        stream = np.random.Philox(key=key, counter=counter)
        uniform = np.random.Generator(stream).random(len(left))
        order = []
        for each in uniform:
            share = np.cumsum(probabilities[left])
            found = int(np.searchsorted(share, each * share[-1], side="right"))
            order.append(left.pop(min(found, len(left) - 1)))
        return order

    def threshold(self, position: int) -> float:
        """Least saliency of a token at `position`; 0 while nothing was accepted."""
        assert self.rule is not None
        past = (
            each.saliency
            for each in reversed(self.accepted)
            if each.position < position and each.saliency is not None
        )
        window = list(islice(past, self.rule.window))
        return self.rule.alpha * float(np.mean(window)) if window else 0.0

    def decide(
        self,
        position: int,
        tokens: Sequence[int],
        order: Sequence[int],
        saliencies: Sequence[float | None],
    ) -> Accepted | None:
        """What is taken at a position, remembered; None if more saliencies must be known for that.

        tokens, saliencies: of the candidates; a saliency is None while unknown, and NaN where there
        is no history. order: as `order` gave it.
        """
        assert self.rule is not None
        threshold = self.threshold(position)
        drawn = order[: self.rule.max_resample]
        for refusals, index in enumerate(drawn):
            saliency = saliencies[index]
            if saliency is None:
                return None
            no_history = bool(np.isnan(saliency))
            if no_history or tokens[index] in self.end_tokens or saliency >= threshold:
                return self._accept(
                    position,
                    tokens[index],
                    None if no_history else saliency,
                    None if no_history else threshold,
                    refusals + 1,
                    refusals,
                    False,
                )
        known = [(saliencies[index], index) for index in order]
        if any(saliency is None for saliency, _ in known):
            return None
        # The earliest drawn of equals, so that ties do not hang on how candidates are numbered.
        best = max(order, key=lambda index: saliencies[index] or 0.0)
        return self._accept(
            position, tokens[best], saliencies[best], threshold, len(drawn), len(drawn), True
        )

    def read(self, position: int, token: int, saliency: float) -> None:
        """Note the saliency of a token that was sampled without a gate."""
        known = None if np.isnan(saliency) else saliency
        self._accept(position, token, known, None, 0, 0, False)

    def _accept(self, position: int, *rest: Any) -> Accepted:
        # A position sampled once more, after preemption, replaces what was sampled before.
        while self.accepted and self.accepted[-1].position >= position:
            self.accepted.pop()
        self.accepted.append(Accepted(position, *rest))
        return self.accepted[-1]

    def as_dict(self, lists_tokens: bool) -> dict[str, Any]:
        """Plain values for the report."""
        return {
            "draws": sum(each.draws for each in self.accepted),
            "refusals": sum(each.refusals for each in self.accepted),
            "fallbacks": sum(each.fallback for each in self.accepted),
            "tokens": [each.as_list() for each in self.accepted[:MAX_TOKENS] if lists_tokens],
        }


class Gates:
    """The gates of a worker's sequences, and what their reports will say."""

    def __init__(self) -> None:
        self.of_request: dict[str, Gate] = {}
        self._of_report: dict[str, list[tuple[Gate, bool]]] = {}

    def add(self, request_id: str, report_id: str, program: SteeringProgram, sampling: Any) -> None:
        """A gate for a new sequence; one that comes back after preemption keeps its own.

        sampling: vLLM's `SamplingParams` (`seed`, `all_stop_token_ids`), None for none.
        """
        if request_id in self.of_request:
            return
        seed = getattr(sampling, "seed", None)
        end_tokens = getattr(sampling, "all_stop_token_ids", ())
        gate = Gate.of(program.sampling_gate, seed, end_tokens)
        self.of_request[request_id] = gate
        lists_tokens = Readout.SALIENCY in program.readouts
        self._of_report.setdefault(report_id, []).append((gate, lists_tokens))

    def remove(self, request_id: str) -> None:
        """Forget a sequence; what its report says stays until it is asked for."""
        self.of_request.pop(request_id, None)

    def pop_report(self, report_id: str) -> list[dict[str, Any]]:
        """`Gate.as_dict` of each sequence of a request, forgotten by asking for it."""
        gates = self._of_report.pop(report_id, [])
        return [gate.as_dict(lists_tokens) for gate, lists_tokens in gates]
