"""Asks every arm everything in a suite, and keeps each answer with what was read from it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from headway.benchmarks.quality.client import Client, EndpointError
from headway.benchmarks.quality.methods import Arm, Method, control_methods
from headway.benchmarks.quality.pope import is_clear, says_yes, yes_margin
from headway.benchmarks.quality.suites import COCO_PROMPT, Question, Suite

Kind = Literal["question", "caption", "text"]
Scoring = Literal["chat", "completions", "none"]


@dataclass(frozen=True)
class Request:
    """One thing to ask; text: what to score, for the kind "text"."""

    kind: Kind
    picture: str | None
    prompt: str
    question: Question | None = None
    text: str = ""

    @property
    def key(self) -> str:
        """The same in every arm, and different for every request of a suite."""
        return "\n".join((self.kind, self.picture or "", self.prompt, self.text))


@dataclass(frozen=True)
class Row:
    """A request and its answer.

    yes, margin: of a question, the margin None without log probabilities; mentions: the objects a
    caption names; logprob, tokens: of a scored text; steering: the answer's `steering` object.
    """

    request: Request
    answer: str = ""
    yes: bool | None = None
    margin: float | None = None
    margin_exact: bool | None = None
    mentions: tuple[str, ...] | None = None
    logprob: float | None = None
    tokens: int | None = None
    steering: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without what does not apply."""
        request = self.request
        values = {
            "kind": request.kind,
            "picture": request.picture,
            "prompt": request.prompt,
            "text": request.text or None,
            "truth": request.question.truth if request.question else None,
            "sets": sorted(request.question.sets) if request.question else None,
            "answer": self.answer if request.kind != "text" else None,
            "clear": is_clear(self.answer) if request.kind == "question" else None,
            "yes": self.yes,
            "margin": self.margin,
            "margin_exact": self.margin_exact,
            "mentions": list(self.mentions) if self.mentions is not None else None,
            "logprob": self.logprob,
            "tokens": self.tokens,
            "steering": self.steering,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class ArmRun:
    """What an arm answered, or why it did not.

    error: the endpoint's; skipped: why it was not even asked; unscored: why no text was scored,
    which ends nothing else, since not every endpoint and method can.
    """

    arm: Arm
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    skipped: str | None = None
    unscored: str | None = None


@dataclass(frozen=True)
class Runner:
    """Runs suites on an endpoint.

    num_heads, vhd: for controls; texts: to score, in the way that `scoring` names; logprobs:
    whether to ask for those of the first token.
    """

    client: Client
    num_heads: int = 0
    vhd: Sequence[Sequence[float]] | None = None
    texts: Sequence[str] = ()
    scoring: Scoring = "chat"
    logprobs: bool = True

    async def run(self, suite: Suite, arms: Sequence[Arm]) -> list[ArmRun]:
        """All arms, one after the other, controls last; an arm's first error ends that arm."""
        runs: dict[str, ArmRun] = {}
        requests, texts = self.requests(suite), self.texts_to_score(suite)
        for arm in sorted(arms, key=lambda arm: arm.control is not None):
            run = runs[arm.name] = ArmRun(arm)
            steering: Mapping[str, Any] = {}
            if arm.control is not None:
                reference = runs.get(arm.control.reference)
                if reference is None or not reference.rows:
                    run.skipped = f"there are no answers of {arm.control.reference} to match"
                    continue
                steering = {row.request.key: row.steering for row in reference.rows}
            started = time.perf_counter()
            try:
                run.rows = await self._all(suite, arm, requests, steering)
            except EndpointError as error:
                run.error = str(error)
            except ValueError as error:
                run.skipped = str(error)
            if run.rows:
                try:
                    run.rows += await self._all(suite, arm, texts, steering)
                except (EndpointError, ValueError) as error:
                    run.unscored = str(error)
            run.seconds = time.perf_counter() - started
        return list(runs.values())

    def requests(self, suite: Suite) -> list[Request]:
        """All questions and captions of a suite, what concerns one picture close together."""
        found = [
            *(Request("question", each.picture, each.text, each) for each in suite.questions),
            *(Request("caption", name, suite.caption_prompt) for name in suite.captioned),
        ]
        order = {name: number for number, name in enumerate(suite.pictures)}
        return sorted(found, key=lambda request: order[request.picture or ""])

    def texts_to_score(self, suite: Suite) -> list[Request]:
        """The neutral texts: by themselves, or each as the answer to a picture of the suite."""
        if self.scoring == "none":
            return []
        if self.scoring == "completions":
            return [Request("text", None, "", text=text) for text in self.texts]
        prompt = suite.caption_prompt or COCO_PROMPT
        pairs = zip(suite.pictures, self.texts, strict=False)
        return [Request("text", name, prompt, text=text) for name, text in pairs]

    async def _all(
        self,
        suite: Suite,
        arm: Arm,
        requests: Sequence[Request],
        steering: Mapping[str, Any],
    ) -> list[Row]:
        """The answers of an arm; steering: of the reference, by request, for a control."""
        calls = [self._call(suite, arm, each, steering.get(each.key)) for each in requests]
        return await self.client.gather(calls, f"{suite.name}, {arm.name}")

    def _call(
        self, suite: Suite, arm: Arm, request: Request, reference: Mapping[str, Any] | None
    ) -> Callable[[], Awaitable[Row]]:
        methods = arm.methods
        if arm.control is not None:
            methods = control_methods(arm.control, request.key, reference, self.num_heads, self.vhd)
        return partial(self._ask, suite, request, methods)

    async def _ask(self, suite: Suite, request: Request, methods: Sequence[Method]) -> Row:
        url = suite.pictures[request.picture].url if request.picture else None
        if request.kind == "text":
            if url is None:
                scored = await self.client.score_text(request.text, methods)
            else:
                scored = await self.client.score_answer(request.prompt, url, request.text, methods)
            total, tokens = sum(scored.logprobs), len(scored.logprobs)
            return Row(request, logprob=total, tokens=tokens, steering=scored.steering)
        if request.kind == "caption":
            answer = await self.client.ask(request.prompt, url, suite.caption_tokens, methods)
            mentions = tuple(suite.matcher.mentions(answer.text))
            return Row(request, answer.text, mentions=mentions, steering=answer.steering)
        answer = await self.client.ask(
            request.prompt, url, suite.answer_tokens, methods, self.logprobs
        )
        margin = yes_margin(answer.top) if answer.top else None
        return Row(
            request,
            answer.text,
            yes=says_yes(answer.text),
            margin=margin.value if margin else None,
            margin_exact=margin.exact if margin else None,
            steering=answer.steering,
        )
