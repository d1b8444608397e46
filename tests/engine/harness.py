"""A real vLLM engine with Headway in the test's own process, so that tests can look inside.

Runs token prompts with or without steering and returns tokens and logprobs; can set the chunk size
of prompt processing, preempt all running requests after a given step, and observe the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from headway.server.engine.request import SteeringRequest, attach
from headway.steering import ModelGeometry, SteeringProgram, compile_spec, parse_spec
from headway.steering.head_words import HeadField, HeadWords, index_shifts
from headway.steering.program import AppliedMethod, HeadEdit

GEOMETRY = ModelGeometry(30, 9, 3, 64, 576, architecture="LlamaForCausalLM")
"""Sizes of SmolLM2-135M, written down here so that `geometry_of` can be checked against them."""


@dataclass
class Job:
    """One request: a token prompt, how to steer it, and how long the output is.

    images: pictures for the `<image>` tokens of the prompt, one each. messages: the texts of the
    chat messages that the prompt was rendered from. sampling: options of `SamplingParams` other
    than those of a greedy run to the end. name: how the engine's ids of the request begin.
    """

    prompt: list[int]
    program: SteeringProgram | None = None
    max_tokens: int = 8
    cache_salt: str | None = None
    images: list[Any] | None = None
    messages: tuple[str, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    request: SteeringRequest | None = field(default=None, init=False)
    name: str = field(default="", init=False)


@dataclass
class Result:
    """Output of a job: tokens and the logprob of each; cached: prompt tokens not run."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None
    cached: int


def program(
    *methods: dict[str, Any], geometry: ModelGeometry = GEOMETRY, report: Any = "summary"
) -> SteeringProgram:
    """Compile methods for the test model, or for another geometry."""
    spec = {"methods": list(methods)} if methods else {}
    return compile_spec(parse_spec({**spec, "report": report}), geometry)


def affine_program(edits: Sequence[tuple[int, int, float, Any]]) -> SteeringProgram:
    """A program from oracle edits (layer, head, scale, shift or None)."""
    words = HeadWords.identity(GEOMETRY)
    shift = np.zeros((GEOMETRY.num_layers, GEOMETRY.num_heads, GEOMETRY.head_size), np.float32)
    for layer, head, scale, vector in edits:
        words.table[layer, head, HeadField.SCALE] = scale
        if vector is not None:
            shift[layer, head] = vector
    words.table[..., HeadField.SHIFT_INDEX], shifts = index_shifts(shift)
    edit = HeadEdit(HeadWords(words.table, shifts))
    return SteeringProgram((edit,), applied=(AppliedMethod("drawn", {}),))


class Harness:
    """Owns one `vllm.LLM` and reaches into its scheduler and model runner."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.max_step_tokens = self.scheduler.max_num_scheduled_tokens
        self._next_id = 0

    def run(
        self,
        jobs: Sequence[Job],
        *,
        step_tokens: int | None = None,
        preempt_after: Sequence[int] = (),
        stagger: int = 0,
    ) -> list[Result]:
        """Run jobs together in one batch, greedily if they do not say otherwise.

        step_tokens: most tokens per engine step (chunked prefill); preempt_after: numbers of
        steps after which every running request is preempted and its cache dropped; stagger: steps
        between the arrivals of two jobs.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        self.scheduler.max_num_scheduled_tokens = step_tokens or self.max_step_tokens
        ids = []
        arrivals = []
        for job in jobs:
            options = {"temperature": 0, "ignore_eos": True, "logprobs": 0, **job.sampling}
            params = SamplingParams(max_tokens=job.max_tokens, **options)
            if job.program is not None:
                job.request = SteeringRequest(job.program, job.messages)
                attach(params, job.request)
            prompt: dict[str, Any] = {"prompt_token_ids": job.prompt}
            if job.cache_salt is not None:
                prompt["cache_salt"] = job.cache_salt
            if job.images is not None:
                prompt["multi_modal_data"] = {"image": job.images}
            job.name = f"job-{self._next_id}"
            ids.append(job.name)
            self._next_id += 1
            arrivals.append((ids[-1], prompt, params))
        finished: dict[str, Any] = {}
        step = 0
        while arrivals or engine.has_unfinished_requests():
            while arrivals and (stagger == 0 or step % stagger == 0):
                engine.add_request(*arrivals.pop(0))
                if stagger:
                    break
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output
            step += 1
            if step in preempt_after:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.scheduler.max_num_scheduled_tokens = self.max_step_tokens
        return [_result(finished[request_id]) for request_id in ids]

    def forget_cache(self) -> None:
        """Drop the prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def record_logits(self, jobs: Sequence[Job], **options: Any) -> list[list[torch.Tensor]]:
        """Run jobs and return, per job, the logits that each of its output tokens came from."""
        model = self.runner.model
        original: Callable[..., Any] = model.compute_logits
        recorded: dict[str, list[torch.Tensor]] = {}

        def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = original(*args, **kwargs)
            batch = self.runner.input_batch
            for row, request_id in enumerate(batch.req_ids):
                recorded.setdefault(request_id, []).append(logits[row].float().clone())
            return logits

        model.compute_logits = compute_logits
        first = self._next_id
        try:
            results = self.run(jobs, **options)
        finally:
            model.compute_logits = original
        # vLLM appends a random suffix to request ids; steps of a partial prompt also give logits.
        by_job = {request_id.rsplit("-", 1)[0]: rows for request_id, rows in recorded.items()}
        assert all(result.finish_reason == "length" for result in results)
        return [
            by_job[f"job-{first + index}"][-len(result.tokens) :]
            for index, result in enumerate(results)
        ]


def largest_difference(
    harness: Harness,
    oracle: Any,
    jobs: Sequence[Job],
    edits: Sequence[Sequence[Any]],
    prompts: Sequence[Sequence[int]] | None = None,
    inputs: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> float:
    """Run jobs in one batch and compare the logits of every output token with an oracle's.

    edits: of each job, for the oracle; prompts: as the engine expands them; inputs: further ones
    of the oracle's model.
    """
    worst = 0.0
    recorded = harness.record_logits(jobs, **options)
    for index, rows in enumerate(recorded):
        prompt = list(prompts[index] if prompts else jobs[index].prompt)
        logits = torch.stack(rows)
        tokens = [int(row.argmax()) for row in rows]
        extra = inputs[index] if inputs else {}
        expected = oracle.logits(prompt + tokens[:-1], edits[index], **extra)[-len(tokens) :]
        worst = max(worst, float((logits - expected).abs().max()))
    return worst


def _result(output: Any) -> Result:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logprobs = [
        step[token].logprob for step, token in zip(completion.logprobs or [], tokens, strict=True)
    ]
    return Result(tokens, logprobs, completion.finish_reason, output.num_cached_tokens or 0)
