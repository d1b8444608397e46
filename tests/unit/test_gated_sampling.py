"""Gated requests in vLLM's own sampler: what is drawn from, and what becomes of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from headway.server.engine import cpu_sampling
from headway.server.engine.cpu_plan import CpuPlanner
from headway.server.engine.cpu_sampling import _processed, gated_sampling
from headway.server.engine.saliency_tape import SaliencyRow
from headway.server.engine.slots import SlotTables
from headway.server.engine.steering_state import SteeringState
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.positions import END, PromptFacts
from headway.steering.wire import encode_facts, encode_program

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, hidden_size=32)
VOCABULARY, PROMPT_LEN = 40, 4


def min_p_of(values: list[float]) -> MinPLogitsProcessor:
    scheduler: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(values)))
    processor = MinPLogitsProcessor(scheduler, torch.device("cpu"), False)
    added = [(at, SamplingParams(min_p=each), [], []) for at, each in enumerate(values)]
    processor.update_state(BatchUpdate(len(values), removed=[], added=added, moved=[]))
    return processor


def metadata_of(params: list[dict], logprobs: int | None = None) -> SamplingMetadata:
    """As vLLM makes it for a batch; of each request temperature, top_k, top_p, min_p."""

    def column(name: str, none: float, dtype: torch.dtype) -> torch.Tensor | None:
        values = [each.get(name, none) for each in params]
        return None if set(values) == {none} else torch.tensor(values, dtype=dtype)

    temperature = torch.tensor([each.get("temperature", 1.0) for each in params])
    greedy = temperature == 0
    zeros = torch.zeros(len(params))
    return SamplingMetadata(
        temperature=None if greedy.all() else temperature,
        all_greedy=bool(greedy.all()),
        all_random=not greedy.any(),
        top_p=column("top_p", 1.0, torch.float32),
        top_k=column("top_k", VOCABULARY, torch.int32),
        generators={at: torch.Generator().manual_seed(at) for at in range(len(params))},
        max_num_logprobs=logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=zeros,
        presence_penalties=zeros,
        repetition_penalties=zeros + 1.0,
        output_token_ids=[[] for _ in params],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([min_p_of([each.get("min_p", 0.0) for each in params])]),
    )


def drawn_logits(count: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed))


PARAMS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5])},
    optional={
        "top_k": st.sampled_from([1, 3, 17]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9]),
        "min_p": st.sampled_from([0.02, 0.2]),
    },
)


@settings(deadline=None, max_examples=150)
@given(st.lists(PARAMS, min_size=1, max_size=5), st.data())
def test_rows_are_drawn_from_what_vllm_draws_from(params, data):
    count = len(params)
    logits = drawn_logits(count, data.draw(st.integers(0, 99)))
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    before, metadata = logits.clone(), metadata_of(params)
    sampler = Sampler(logprobs_mode="processed_logits")
    got, greedy = _processed(sampler, logits, metadata, torch.tensor(chosen))
    assert torch.equal(logits, before)
    _, masked = sampler.sample(logits.clone(), metadata)  # None if nothing is drawn
    for index, sequence in enumerate(chosen):
        is_greedy = params[sequence]["temperature"] == 0.0
        assert bool(greedy[index]) is is_greedy
        want = before if is_greedy or masked is None else masked
        torch.testing.assert_close(got[index], want[sequence])


class Half:
    """Instead of the pass back: the saliency of a token is 1 if its number is even, else 0."""

    made: list[Half]

    def __init__(self, decoder: Any, tape: Any, logits: torch.Tensor, dtype: torch.dtype) -> None:
        assert (decoder, dtype) == ("decoder", torch.bfloat16)
        self.tape, self.logits = tape, logits
        self.made.append(self)

    def saliencies(self, chosen: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        return (candidates % 2 == 0).float()


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Half]:
    monkeypatch.setattr(cpu_sampling, "SaliencyPass", Half)
    monkeypatch.setattr(Half, "made", [], raising=False)
    return Half.made


def runner_of(names: str) -> Any:
    """A runner with gated requests, which have let a token of saliency 1 through."""
    steering = SteeringState(GEOMETRY, CpuPlanner(SlotTables(GEOMETRY, 8)))
    spec = {"methods": [{"method": "sgrs", "alpha": 0.9, "top_k": 6, "max_resample": 6}]}
    program = compile_spec(parse_spec(spec), GEOMETRY)
    payload = {**encode_program(program), "facts": encode_facts(PromptFacts(PROMPT_LEN))}
    for name in names:
        steering.add(name, {"report_id": name, **payload}, SamplingParams(seed=ord(name)))
        steering.gates.of_request[name].decide(PROMPT_LEN + 1, [2], [0], [1.0])
    sampler = Sampler()
    return SimpleNamespace(
        steering=steering, sampler=sampler, decoder="decoder", dtype=torch.bfloat16
    )


def tape_of(**sequences: int) -> Any:
    rows = [
        SaliencyRow(name, at, at, PROMPT_LEN + 1, PROMPT_LEN, -1, -1, (1,), ((PROMPT_LEN, END),))
        for name, at in sequences.items()
    ]
    return SimpleNamespace(rows=tuple(rows), seconds=0.25)


MIXED = [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 9}]
KINDS = {"mixed": MIXED, "greedy": [MIXED[0]] * 4, "random": [MIXED[1], MIXED[3]] * 2}


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_the_sampler_gives_gated_rows_what_their_gates_take(params, passes):
    runner, tape = runner_of("ab"), tape_of(a=3, b=0)
    logits, plain = drawn_logits(4, 7).bfloat16(), Sampler()
    want = plain(drawn_logits(4, 7).bfloat16(), metadata_of(params, 2))
    with gated_sampling(runner, tape, logits):
        got = runner.sampler(logits, metadata_of(params, 2))
        logits.fill_(0.0)  # what is kept for the way back is a copy
    sampled = got.sampled_token_ids
    assert sampled.dtype is want.sampled_token_ids.dtype
    assert torch.equal(sampled[1:3], want.sampled_token_ids[1:3])
    raw = drawn_logits(4, 7).bfloat16().float()
    for name, at in (("a", 3), ("b", 0)):
        accepted = runner.steering.gates.of_request[name].accepted[-1]
        assert sampled[at].item() == accepted.token_id and accepted.token_id % 2 == 0
        assert accepted.position == PROMPT_LEN + 2 and accepted.threshold == 0.9
    assert torch.equal(passes[0].logits, raw[[3, 0]])
    # The log-probabilities are the model's own, of the tokens that were really taken.
    found = got.logprobs_tensors
    assert torch.equal(found.logprob_token_ids[:, 0], sampled[:, 0])
    own = raw.log_softmax(-1).gather(1, sampled.long())
    torch.testing.assert_close(found.logprobs[:, :1], own)
    assert runner.steering.take_failed() == ()


def test_the_sampler_is_left_as_it_was():
    runner, tape, logits = runner_of("a"), tape_of(a=1), drawn_logits(4)
    before, started = tape.seconds, runner.steering.step_seconds.as_dict()
    with gated_sampling(runner, tape, logits):
        assert "sample" in vars(runner.sampler)
        runner.sampler(logits, metadata_of(MIXED))
    assert "sample" not in vars(runner.sampler)
    assert tape.seconds > before and runner.steering.step_seconds.as_dict() != started
    report = runner.steering.reports.of(runner.steering.requests["a"].report_id)
    assert report.seconds == pytest.approx(tape.seconds - before)


def test_a_sampler_that_was_not_asked_ends_the_gated_requests():
    runner = runner_of("ab")
    with gated_sampling(runner, tape_of(a=3), drawn_logits(4)):
        pass
    assert runner.steering.take_failed() == ("a",)
    assert runner.steering.pop_report("a").failed_stage == "sampling"


def test_where_nothing_can_be_drawn_vllms_tokens_are_kept(monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("moved")

    monkeypatch.setattr(cpu_sampling, "apply_top_k_top_p_pytorch", fail)
    runner, logits = runner_of("ab"), drawn_logits(4)
    want = Sampler()(drawn_logits(4), metadata_of(MIXED)).sampled_token_ids
    with gated_sampling(runner, tape_of(a=3, b=0), logits):
        got = runner.sampler(logits, metadata_of(MIXED)).sampled_token_ids
    assert torch.equal(got, want)
    assert sorted(runner.steering.take_failed()) == ["a", "b"]
