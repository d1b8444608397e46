"""Questions about pictures, for a Headway engine of the demo model in this process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

from headway.benchmarks.quality.scenes import scene
from headway.server.engine.client import engine_report
from headway.server.engine.report import EngineReport
from headway.server.engine.request import SteeringRequest, attach
from headway.server.models.demo_vlm import TOKENS_PER_IMAGE
from headway.steering import compile_spec, parse_spec

QUESTION = "Is there a {} {} in the image?"
"""POPE's question, with a word more, so that there are enough of them."""
PROMPT = "<|im_start|>user\n<image>{}<|im_end|>\n<|im_start|>assistant\n"
ADJECTIVES = (
    *("red", "green", "blue", "white", "black", "yellow", "brown", "small", "large", "new"),
    *("round", "long", "short", "wooden", "metal", "bright", "dark", "broken", "closed", "full"),
    *("wet", "dry", "heavy", "light", "soft", "hard", "thin", "thick", "clean", "dirty"),
    *("cheap", "plain", "tall", "wide", "warm", "cold"),
)
NOUNS = (
    *("fork", "knife", "cup", "spoon", "laptop", "mouse", "book", "lamp", "car", "tree"),
    *("bench", "chair", "table", "boat", "fish", "dog", "cat", "bird", "horse", "house"),
    *("door", "window", "ball", "hat", "shoe", "bag", "box", "bottle", "clock", "phone"),
    *("bed", "plate", "bowl", "train", "bus", "bike", "bridge", "road", "flower", "cake"),
)
SPLIT = "test_counter"
KNOWN_TEXTS = 8
BATCH, OUTPUT_TOKENS = 16, 64

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Condition:
    """What a request asks for.

    steering: the spec, None where it is unsteered. is_known: its text is one that requests whose
    heads were chosen have asked before; otherwise nobody has. passes: how many texts are run
    without their image for it.
    """

    name: str
    steering: dict[str, Any] | None = None
    is_known: bool = False
    passes: int = 0

    @property
    def chooses(self) -> bool:
        """Whether the heads are chosen by the prompt."""
        return self.steering is not None and self.steering["methods"][0]["heads"] == "auto"


@dataclass(frozen=True)
class Timing:
    """Output tokens, and the wall-clock and CPU time of the engine's process they took."""

    tokens: int
    seconds: float
    cpu_seconds: float


class Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def timing(self, tokens: int) -> Timing:
        """What this many tokens took."""
        cpu_seconds = time.process_time() - self._cpu
        return Timing(tokens, time.perf_counter() - self._started, cpu_seconds)


def questions(tokenize: Tokenize, seed: int = 0) -> list[str]:
    """Questions in random order, no two alike and all of the same number of tokens.

    Those with a word that is several tokens are left out.
    """
    texts = [QUESTION.format(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS]
    lengths = [len(tokenize(text)) for text in texts]
    texts = [text for text, length in zip(texts, lengths, strict=True) if length == min(lengths)]
    random.Random(seed).shuffle(texts)
    return texts


class ImageEngine:
    """A `vllm.LLM` of the demo model, float32 and eager, otherwise as by default.

    Every request has a picture that no other has. `first_token` and `decode` raise RuntimeError
    where a request was not served as its condition says.

    new_texts: questions that nobody has asked. prompt_tokens: of every prompt, with its image.
    """

    def __init__(self, model: Path, seed: int = 0) -> None:
        from vllm import LLM

        from headway.server.engine.geometry import geometry_of

        self.llm = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=BATCH,
            limit_mm_per_prompt={"image": 1},
            additional_config={"headway": {}},
            seed=0,
        )
        self.engine: Any = self.llm.llm_engine
        self.config: Any = self.engine.vllm_config
        self.geometry = geometry_of(self.config)
        self.tokenizer: Any = self.llm.get_tokenizer()
        texts = questions(self._tokenize, seed)
        self.new_texts = texts[KNOWN_TEXTS:]
        self._known: Iterator[str] = cycle(texts[:KNOWN_TEXTS])
        self._numbers = count()
        self.prompt_tokens = len(self._tokenize(PROMPT.format(texts[0]))) - 1 + TOKENS_PER_IMAGE

    @property
    def text_passes(self) -> int:
        """How many texts were run without their image so far."""
        passes: int = self.engine.engine_core.engine_core.scheduler.text_passes.passes
        return passes

    def first_token(self, condition: Condition) -> tuple[Timing, EngineReport | None]:
        """Ask once: from adding the request to its first token, and what was steered."""
        prompt, passes = self._prompt(condition), self.text_passes
        clock = Clock()
        request = self._add(prompt, condition, 1)
        outputs: list[Any] = []
        while not outputs:
            outputs = self.engine.step()
        timing = clock.timing(1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        (report,) = self._check(condition, [request], outputs, passes)
        return timing, report

    def decode(self, condition: Condition, output_tokens: int = OUTPUT_TOKENS) -> Timing:
        """Ask a batch: the output tokens of all together, once each has its first."""
        prompts, passes = [self._prompt(condition) for _ in range(BATCH)], self.text_passes
        requests = [self._add(prompt, condition, output_tokens) for prompt in prompts]
        latest: dict[str, Any] = {}
        while len(latest) < BATCH:
            latest |= {output.request_id: output for output in self.engine.step()}
        before, clock = _num_tokens(latest), Clock()
        while self.engine.has_unfinished_requests():
            latest |= {output.request_id: output for output in self.engine.step()}
        timing = clock.timing(_num_tokens(latest) - before)
        self._check(condition, requests, list(latest.values()), passes)
        if _num_tokens(latest) != BATCH * output_tokens:
            raise RuntimeError(f"{condition.name}: a request of the batch failed")
        return timing

    def _tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def _prompt(self, condition: Condition) -> dict[str, Any]:
        text = next(self._known) if condition.is_known else self.new_texts.pop()
        picture = scene(SPLIT, next(self._numbers)).image
        return {
            "prompt_token_ids": self._tokenize(PROMPT.format(text)),
            "multi_modal_data": {"image": picture},
        }

    def _add(
        self, prompt: dict[str, Any], condition: Condition, max_tokens: int
    ) -> SteeringRequest | None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = None
        if condition.steering is not None:
            program = compile_spec(parse_spec(condition.steering), self.geometry)
            request = SteeringRequest(program)
            attach(params, request)
        self.engine.add_request(f"{condition.name} {next(self._numbers)}", prompt, params)
        return request

    def _check(
        self,
        condition: Condition,
        requests: Sequence[SteeringRequest | None],
        outputs: Sequence[Any],
        passes: int,
    ) -> list[EngineReport | None]:
        lengths = {len(output.prompt_token_ids) for output in outputs}
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        if lengths != {self.prompt_tokens} or cached:
            message = f"prompts of {lengths} tokens, {cached} of them cached"
            raise RuntimeError(f"{condition.name}: {message}")
        run, asked = self.text_passes - passes, condition.passes * len(requests)
        if run != asked:
            raise RuntimeError(f"{condition.name}: {run} texts were run alone, not {asked}")
        reports = [self._report(request) for request in requests]
        for request, report in zip(requests, reports, strict=True):
            if request is not None and (report is None or not report.is_complete):
                raise RuntimeError(f"{condition.name}: not steered as asked: {report}")
            if report is not None and bool(report.heads) != condition.chooses:
                raise RuntimeError(f"{condition.name}: the heads chosen are {report.heads}")
        return reports

    def _report(self, request: SteeringRequest | None) -> EngineReport | None:
        if request is None:
            return None
        method = "headway_pop_report"
        return engine_report(self.llm.collective_rpc(method, args=(request.report_id,)))


def _num_tokens(outputs: dict[str, Any]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs.values())
