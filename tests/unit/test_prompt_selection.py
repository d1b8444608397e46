"""Prompts by which heads cannot be chosen are refused before the engine sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headway.server.engine.prompt import Prompt, check_selection
from headway.steering import SteeringError
from headway.steering.positions import PromptFacts

pytestmark = pytest.mark.unit

BLOCK_SIZE, MAX_MODEL_LEN = 16, 100
IMAGE = 36


def config(blocks: int, budget: int = 1000, threshold: int = 0, max_num_seqs: int = 4) -> Any:
    """Of an engine whose KV cache has so many blocks."""
    longest = -(-MAX_MODEL_LEN // BLOCK_SIZE)
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(
            max_num_seqs=max_num_seqs,
            max_num_scheduled_tokens=None,
            max_num_batched_tokens=budget,
            long_prefill_token_threshold=threshold,
        ),
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
        cache_config=SimpleNamespace(
            block_size=BLOCK_SIZE, kv_cache_max_concurrency=blocks / longest
        ),
    )


def refusal(length: int, baseline: bool, vllm_config: Any) -> SteeringError | None:
    """Why heads cannot be chosen by a prompt of this length, with one image."""
    program: Any = SimpleNamespace(
        head_selection=SimpleNamespace(reinforce_baseline=baseline),
        selection_param="steering.methods[0]",
    )
    image = (2, 2 + IMAGE)
    facts = PromptFacts(length, (image,), (image,), ())
    try:
        check_selection(program, Prompt([1] * length, length), facts, vllm_config)
    except SteeringError as error:
        return error
    return None


@pytest.mark.parametrize("blocks", range(3, 12))
def test_a_pair_that_the_cache_never_holds_is_refused(blocks: int) -> None:
    """Of a cache of n blocks n - 1 are given out; a prompt takes one more than it fills."""
    for length in range(40, 100):
        needed = length // BLOCK_SIZE + 1 + (length - IMAGE) // BLOCK_SIZE + 1
        found = refusal(length, True, config(blocks))
        assert (found is not None) == (needed > blocks - 1), length
        if found is not None:
            assert (found.reason, found.param) == ("E_PROMPT_TOO_LONG", "steering.methods[0]")
            assert f"of {(blocks - 1) * BLOCK_SIZE} tokens" in str(found)
        assert refusal(length, False, config(blocks)) is None, "its pass may run before it"


def test_an_engine_that_does_not_say_how_large_its_cache_is() -> None:
    vllm_config = config(3)
    vllm_config.cache_config.kv_cache_max_concurrency = None
    assert refusal(90, True, vllm_config) is None


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(("budget", "threshold", "limit"), [(100, 0, 97), (100, 50, 50)])
def test_the_prompt_must_fit_into_one_step(
    baseline: bool, budget: int, threshold: int, limit: int
) -> None:
    most = (limit + IMAGE) // 2 if baseline else limit
    vllm_config = config(100, budget, threshold)
    assert refusal(most, baseline, vllm_config) is None
    found = refusal(most + 1, baseline, vllm_config)
    assert found is not None and found.reason == "E_PROMPT_TOO_LONG"
    assert f"at most {limit} tokens" in str(found)


def test_a_baseline_needs_a_second_sequence() -> None:
    found = refusal(50, True, config(100, max_num_seqs=1))
    assert found is not None and found.reason == "E_UNSUPPORTED"
    assert refusal(50, False, config(100, max_num_seqs=1)) is None
