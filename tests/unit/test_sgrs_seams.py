"""What the sampling gate takes for granted about vLLM's sampler, beyond that it is there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample import sampler as module
from vllm.v1.sample.logits_processor import LogitsProcessor, LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from headway.server.engine.cpu_sampling import GREEDY_BELOW

pytestmark = pytest.mark.unit

VOCABULARY = 12


class Doubles(LogitsProcessor):
    """invariant: whether vLLM is told that this leaves the argmax alone."""

    def __init__(self, invariant: bool) -> None:
        self.invariant = invariant

    def is_argmax_invariant(self) -> bool:
        return self.invariant

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.mul_(2.0)


def metadata(*processors: LogitsProcessor, allowed: int, **changes: Any) -> SamplingMetadata:
    """Two requests, the second one greedy; tokens from `allowed` on are forbidden to both."""
    forbidden = torch.arange(VOCABULARY).expand(2, -1) >= allowed
    values: dict[str, Any] = {
        "temperature": torch.tensor([0.5, 0.0]),
        "all_greedy": False,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": 0,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": torch.zeros(2),
        "presence_penalties": torch.zeros(2),
        "repetition_penalties": torch.ones(2),
        "output_token_ids": [[], []],
        "allowed_token_ids_mask": forbidden,
        "bad_words_token_ids": {0: [[1]]},
        "logitsprocs": LogitsProcessors(processors),
    }
    return SamplingMetadata(**{**values, **changes})


def drawn() -> torch.Tensor:
    return torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_an_instance_s_own_sample_is_asked_and_its_tokens_are_given_out():
    sampler, seen = Sampler(), []

    def sample(logits: torch.Tensor, given: SamplingMetadata) -> tuple[torch.Tensor, None]:
        seen.append((logits.clone(), given))
        return torch.tensor([4, 2]), None

    sampler.sample = sample
    asked = metadata(Doubles(False), Doubles(True), allowed=6)
    output = sampler(drawn(), asked)
    assert output.sampled_token_ids.tolist() == [[4], [2]]
    ((logits, given),) = seen
    assert given is asked and logits.dtype is torch.float32
    want = 2.0 * drawn().float()  # temperature, and what leaves the argmax alone, come later
    want[:, 6:] = want[0, 1] = -torch.inf
    assert torch.equal(logits, want)
    # Of the model's own logits, to which nothing was applied.
    own = drawn().float().log_softmax(-1)
    logprobs = output.logprobs_tensors.logprobs[:, 0]
    torch.testing.assert_close(logprobs, torch.stack([own[0, 4], own[1, 2]]))
    del sampler.sample
    assert sampler.sample.__func__ is Sampler.sample


def test_tokens_may_be_replaced_in_place():
    """Where some rows are greedy vLLM returns the tensor that it made for them."""
    for changes in ({}, {"temperature": None, "all_greedy": True}):
        tokens, _ = Sampler().sample(drawn().float(), metadata(allowed=VOCABULARY, **changes))
        assert tokens.shape == (2,) and not tokens.is_floating_point()
        tokens[torch.tensor([1])] = 7
        assert tokens[1] == 7


def test_below_the_same_temperature_nothing_is_drawn():
    assert GREEDY_BELOW == module._SAMPLING_EPS
    logits, greedy = torch.ones(2, 3), torch.tensor([0.5, GREEDY_BELOW / 2])
    applied = Sampler.apply_temperature(logits, greedy, False)
    assert applied.tolist() == [[2.0] * 3, [1.0] * 3]


def test_the_bitmask_of_a_grammar_is_applied_after_the_logits_are_left_to_us():
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    order = [") = self.execute_model_state", "apply_grammar_bitmask(", "self._sample(logits"]
    places = [source.index(words) for words in order]
    assert places == sorted(places)


def test_a_waiting_request_is_asked_about_before_it_runs():
    """In one place only do requests start, and the question comes before."""
    source = inspect.getsource(Scheduler.schedule)
    starts = "self.running.append("
    assert inspect.getsource(Scheduler).count(starts) == source.count(starts) == 1
    asked = source.index("ready_to_schedule = self._handle_blocked_waiting_request(request)")
    assert asked < source.index(starts)
    between = source[asked : source.index(starts)]
    assert "if not ready_to_schedule:" in between and "allocate_slots(" in between
