"""Whom the failure of a request ends, what it leaves in the cache, and what vLLM gets to see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput

from headway.server.engine.request import EXTRA_ARG
from headway.server.engine.scheduler import end_requests

pytestmark = pytest.mark.unit

BLOCK_SIZE = 4


class Scheduler:
    """What vLLM's scheduler keeps that matters here. blocks: of each request, by position."""

    def __init__(self, blocks: dict[str, list[int]], *requests: Any) -> None:
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK_SIZE))
        self.kv_cache_manager = SimpleNamespace(
            block_pool=SimpleNamespace(null_block=SimpleNamespace(block_id=0)),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
            get_block_ids=lambda request_id: [blocks[request_id]],
        )
        self.requests = {each.request_id: each for each in requests}
        self.running = list(requests)
        self.encoder_cache_mismatch_reqs: set[str] = set()
        self.spoiled: set[int] = set()

    def spoil(self, blocks: set[int]) -> None:
        self.spoiled |= blocks


def request(name: str, computed: int, in_flight: int, touched: int | None = None) -> Any:
    """touched: the first position that is edited."""
    keys = [] if touched is None else [(touched, "fingerprint"), (touched + 1, "prompt_len=9")]
    return SimpleNamespace(
        request_id=name,
        num_computed_tokens=computed,
        num_in_flight_tokens=in_flight,
        sampling_params=SimpleNamespace(extra_args={EXTRA_ARG: {"cache_keys": keys}}),
    )


def output(*names: str) -> ModelRunnerOutput:
    """Of a step in which every request got a token and the logprobs of its prompt."""
    return ModelRunnerOutput(
        req_ids=list(names),
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[7] for _ in names],
        prompt_logprobs_dict={name: LogprobsTensors.empty_cpu(3, 1) for name in names},
        prompt_token_id_logprobs_dict={name: torch.ones(3, 1) for name in names},
    )


def test_of_a_failed_request_nothing_is_left_that_vllm_would_send():
    """A token would be delivered; logprobs of a prompt without one stop the whole engine."""
    scheduler = Scheduler({"a": [1], "b": [2]}, request("a", 3, 3, 0), request("b", 3, 3))
    result = output("a", "b")
    end_requests(scheduler, ["a", "has gone"], result)
    assert scheduler.encoder_cache_mismatch_reqs == {"a"}
    assert result.sampled_token_ids == [[], [7]]
    assert result.prompt_logprobs_dict.keys() == {"b"}
    assert result.prompt_token_id_logprobs_dict.keys() == {"b"}


def test_a_step_without_tokens_will_do():
    scheduler = Scheduler({"a": [1]}, request("a", 3, 3, 0))
    end_requests(scheduler, ["a"], ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}))
    assert scheduler.encoder_cache_mismatch_reqs == {"a"}


def test_who_shares_what_precedes_the_edit_goes_on():
    """Blocks 1 and 2 are those of an unsteered request; block 3 holds the first edited position."""
    scheduler = Scheduler(
        {"a": [1, 2, 3, 4], "b": [1, 2, 5]}, request("a", 14, 14, 9), request("b", 11, 3)
    )
    end_requests(scheduler, ["a"], output("a", "b"))
    assert scheduler.encoder_cache_mismatch_reqs == {"a"}
    assert scheduler.spoiled == {3, 4}


def test_who_shares_what_was_spoiled_ends_and_what_they_wrote_goes_too():
    """c has block 3 of b, but 1 is behind its window."""
    scheduler = Scheduler(
        {"a": [1, 2], "b": [1, 2, 3], "c": [0, 0, 3, 4], "d": [5]},
        request("a", 8, 8, 0),
        request("b", 12, 4, 0),
        request("c", 16, 4, 0),
        request("d", 4, 4, 0),
    )
    result = output("a", "b", "c", "d")
    end_requests(scheduler, ["a"], result)
    assert scheduler.encoder_cache_mismatch_reqs == {"a", "b", "c"}
    assert scheduler.spoiled == {1, 2, 3, 4}
    assert result.sampled_token_ids == [[], [], [], [7]]
    assert result.prompt_logprobs_dict.keys() == {"d"}


def test_where_nothing_is_edited_nothing_is_spoiled():
    """A request whose tokens are judged has the keys and values of an unsteered one."""
    scheduler = Scheduler({"a": [1, 2], "b": [1, 2]}, request("a", 8, 8), request("b", 8, 8))
    end_requests(scheduler, ["a"], output("a", "b"))
    assert scheduler.encoder_cache_mismatch_reqs == {"a"}
    assert scheduler.spoiled == set()
