"""Whether unsteered answers are those of stock vLLM, whatever ran beside them.

An answer is equal if its tokens are, and their log probabilities within a tolerance: sums are
rounded differently in batches and chunks of other sizes, in stock vLLM as well. That can turn a
choice between two tokens that are as good as tied. Such an answer is a tie, and neither held for
nor against Headway, in two cases only:

- greedy, and at the first token that differs stock vLLM itself has both within the tolerance;
- stock vLLM itself gives the very answer once other requests run beside it.

All else differs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import httpx

from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.soak_asks import CHAT
from headway.benchmarks.soak_load import LIMITS, TIMEOUT_SECONDS, Sample

TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
"""Of log probabilities, in nats. `tests/engine/test_invariance.py` holds 1e-4 in float32."""
AT_ONCE = 8
COMPANY = (3, 7, 15)
"""How many other requests run beside one that stock vLLM is asked once more."""


class Kept(StrEnum):
    """What came of the comparison of an answer."""

    EQUAL = "equal"
    TIE = "tie"
    DIFFERS = "differs"


@dataclass(frozen=True)
class Tokens:
    """What was generated: tokens as ids, the log probability of each, and those of the best."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    best: tuple[Mapping[str, float], ...]
    finish: str | None

    @classmethod
    def of(cls, path: str, answer: Mapping[str, Any]) -> Tokens:
        """From the JSON of an answer. Raises KeyError, TypeError where it has no logprobs."""
        choice = answer["choices"][0]
        finish = choice["finish_reason"]
        found = choice["logprobs"]
        if path == CHAT:
            rows = found["content"]
            best = tuple(
                {each["token"]: each["logprob"] for each in row["top_logprobs"]} for row in rows
            )
            tokens = tuple(row["token"] for row in rows)
            return cls(tokens, tuple(row["logprob"] for row in rows), best, finish)
        best = tuple(found["top_logprobs"])
        return cls(tuple(found["tokens"]), tuple(found["token_logprobs"]), best, finish)


@dataclass
class Parity:
    """What came of every sample, and of each that differs where and how."""

    kept: list[Kept] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    largest: float = 0.0  # difference of log probabilities, of equal answers

    def count(self, which: Kept) -> int:
        """How many samples came to this."""
        return Counter(self.kept)[which]


def compare(ours: Tokens, stock: Tokens, greedy: bool, tolerance: float) -> tuple[Kept, str]:
    """What came of one answer, and in words where it is not equal."""
    for index, (token, other) in enumerate(zip(ours.tokens, stock.tokens, strict=False)):
        if token != other:
            where = f"token {index} is {token}, of stock vLLM {other}"
            best = stock.best[index]
            if greedy and token in best and other in best:
                gap = abs(best[other] - best[token])
                return (Kept.TIE if gap <= tolerance else Kept.DIFFERS), f"{where}, {gap:.2g} apart"
            return Kept.DIFFERS, where
        gap = abs(ours.logprobs[index] - stock.logprobs[index])
        if gap > tolerance:
            return Kept.DIFFERS, f"the log probability of token {index} differs by {gap:.2g}"
    if (len(ours.tokens), ours.finish) != (len(stock.tokens), stock.finish):
        ends = [f"{len(each.tokens)} tokens, {each.finish}" for each in (ours, stock)]
        return Kept.DIFFERS, f"ends with {ends[0]}, of stock vLLM {ends[1]}"
    return Kept.EQUAL, ""


async def compare_all(url: str, model: str, samples: Sequence[Sample], tolerance: float) -> Parity:
    """Ask stock vLLM for all samples and compare. Raises EndpointError where it does not answer.

    model: the name that it answers to.
    """
    parity = Parity()
    at_once = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=LIMITS) as http:

        async def ask(sample: Sample) -> Tokens:
            body = {**sample.body, "model": model}
            body.pop("steering", None)  # of strength zero
            response = await http.post(sample.path, json=body)
            if response.status_code != httpx.codes.OK:
                raise EndpointError(f"stock vLLM: {response.status_code} {response.text[:300]}")
            return Tokens.of(sample.path, response.json())

        async def ask_in_turn(sample: Sample) -> Tokens:
            async with at_once:
                return await ask(sample)

        answers = await asyncio.gather(*map(ask_in_turn, samples))
        for index, (sample, stock) in enumerate(zip(samples, answers, strict=True)):
            ours = Tokens.of(sample.path, sample.answer)
            greedy = not sample.body["temperature"]
            kept, what = compare(ours, stock, greedy, tolerance)
            if kept is Kept.EQUAL:
                gaps = zip(ours.logprobs, stock.logprobs, strict=True)
                parity.largest = max((parity.largest, *(abs(a - b) for a, b in gaps)))
            others = [*samples[:index], *samples[index + 1 :]]
            for company in COMPANY if kept is Kept.DIFFERS else ():
                beside = others[:company]
                again, *_ = await asyncio.gather(ask(sample), *map(ask, beside))
                if compare(ours, again, greedy, tolerance)[0] is Kept.EQUAL:
                    kept, what = Kept.TIE, f"{what}; as stock vLLM answers beside {len(beside)}"
                    break
            parity.kept.append(kept)
            if kept is not Kept.EQUAL:
                parity.details.append(f"{kept}: {sample.path}: {what}: {sample.body}"[:600])
    return parity
