"""Which candidate the gate of a sequence takes, against the oracle's own writing of the rule."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from headway.server.engine import sampling_gate
from headway.server.engine.sampling_gate import Accepted, Gate, Gates
from headway.steering.program import (
    QueryScope,
    Readout,
    SaliencyRule,
    SamplingGate,
    SteeringProgram,
)
from tests.sgrs_oracle import decide

pytestmark = pytest.mark.unit

PROMPT_LEN = 7
RULE = SamplingGate(0.5, 4, 2, 3)


class Token(NamedTuple):
    """What is decided at a position; order: of those that may be drawn; None: no history."""

    tokens: list[int]
    order: list[int]
    saliencies: list[float] | None

    @property
    def given(self) -> list[float]:
        return self.saliencies or [math.nan] * len(self.tokens)


# Eighths, and powers of two as factors: ties and saliencies just at the threshold are drawn, and no
# rounding hangs on who computes it.
EIGHTHS = st.integers(0, 8).map(lambda eighths: eighths / 8)


@st.composite
def drawn_tokens(draw: st.DrawFn, top_k: int) -> list[Token]:
    drawn = []
    for _ in range(draw(st.integers(1, 8))):
        tokens = draw(st.lists(st.integers(0, 40), min_size=top_k, max_size=top_k, unique=True))
        order = draw(st.permutations(range(top_k)))[: draw(st.integers(1, top_k))]
        values = draw(st.lists(EIGHTHS, min_size=top_k, max_size=top_k))
        # What may not be drawn has no saliency either.
        values = [value if at in order else math.nan for at, value in enumerate(values)]
        has_history = bool(drawn) and (drawn[-1].saliencies is not None or draw(st.booleans()))
        drawn.append(Token(tokens, list(order), values if has_history else None))
    return drawn


@st.composite
def drawn_cases(draw: st.DrawFn) -> tuple[SamplingGate, frozenset[int], list[Token]]:
    top_k = draw(st.integers(1, 6))
    alpha, window = draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])), draw(st.integers(1, 5))
    rule = SamplingGate(alpha, top_k, draw(st.integers(1, top_k)), window)
    ends = draw(st.frozensets(st.integers(0, 40), max_size=4))
    return rule, ends, draw(drawn_tokens(top_k))


def expected(
    rule: SamplingGate, ends: frozenset[int], tokens: list[Token]
) -> list[tuple[int, float | None, float | None, int, int, bool]]:
    """What the oracle decides, one token after the other."""
    accepted: list[float] = []
    decisions = []
    for each in tokens:
        order = [each.tokens[at] for at in each.order]
        saliency = None
        if each.saliencies is not None:
            saliency = {each.tokens[at]: each.saliencies[at] for at in each.order}
        found = decide(order, saliency, accepted, rule.alpha, rule.max_resample, rule.window, ends)
        decisions.append(tuple(found))
        if found.saliency is not None:
            accepted.append(found.saliency)
    return decisions


def plain(accepted: Accepted | None) -> tuple:
    assert accepted is not None
    return tuple(vars(accepted).values())[1:]


@settings(deadline=None, max_examples=400)
@given(drawn_cases())
def test_every_decision_is_the_oracle_s(case):
    rule, ends, tokens = case
    gate = Gate(rule, 0, ends)
    for position, (each, want) in enumerate(zip(tokens, expected(*case), strict=True), PROMPT_LEN):
        found = gate.decide(position, each.tokens, each.order, each.given)
        assert plain(found) == want and found is gate.accepted[-1]
    positions = [each.position for each in gate.accepted]
    assert positions == list(range(PROMPT_LEN, PROMPT_LEN + len(tokens)))


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9, 1.1])
def test_long_answers_are_decided_as_by_the_oracle(alpha):
    draw = np.random.default_rng(5)
    rule = SamplingGate(alpha, 5, 3, 5)
    tokens = [Token([1, 2, 3, 4, 5], draw.permutation(5).tolist(), None)]
    for _ in range(400):
        order, values = draw.permutation(5).tolist(), draw.gamma(2.0, 0.1, 5).tolist()
        tokens.append(Token([1, 2, 3, 4, 5], order, values))
    gate = Gate(rule, 0)
    wanted = expected(rule, frozenset(), tokens)
    for position, (each, want) in enumerate(zip(tokens, wanted, strict=True)):
        found = plain(gate.decide(position, each.tokens, each.order, each.given))
        assert found[:2] == want[:2] and found[3:] == want[3:]
        assert (found[2] or 0.0) == pytest.approx(want[2] or 0.0, rel=1e-12)
    assert {want[4] for want in wanted} >= {0, 1, 2} and any(want[5] for want in wanted)


@settings(deadline=None, max_examples=200)
@given(drawn_cases(), st.data())
def test_saliencies_that_are_not_known_yet_change_nothing(case, data):
    """Any set of known ones leads to the same decision or to none, and never to more questions."""
    rule, ends, tokens = case
    gate, lazy = Gate(rule, 0, ends), Gate(rule, 0, ends)
    for position, each in enumerate(tokens):
        want = gate.decide(position, each.tokens, each.order, each.given)
        assert want is not None
        needed = each.order if want.fallback else each.order[: want.draws]
        known = data.draw(st.sets(st.sampled_from(each.order)))
        partly = [value if at in known else None for at, value in enumerate(each.given)]
        found = lazy.decide(position, each.tokens, each.order, partly)
        assert (found is None) == (not set(needed) <= known)
        if found is None:
            assert len(lazy.accepted) == position  # nothing was remembered
            partly = [value if at in needed else None for at, value in enumerate(each.given)]
            found = lazy.decide(position, each.tokens, each.order, partly)
        assert found == want
    assert lazy.accepted == gate.accepted


@settings(deadline=None, max_examples=100)
@given(drawn_cases(), st.data())
def test_a_position_that_is_decided_again_replaces_what_was(case, data):
    """Preemption: from some position on all is decided once more, to the same end."""
    rule, ends, tokens = case
    gate = Gate(rule, 0, ends)

    def run(start: int) -> None:
        for position in range(start, len(tokens)):
            each = tokens[position]
            gate.decide(position, each.tokens, each.order, each.given)

    run(0)
    once, report = list(gate.accepted), gate.as_dict(True)
    for start in data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=3)):
        run(start)
        assert gate.accepted == once and gate.as_dict(True) == report


def test_saliencies_that_were_only_read_are_listed_without_draws():
    gate = Gate(None, 0)
    gate.read(7, 40, math.nan)
    gate.read(8, 41, 0.25)
    gate.read(8, 42, 0.5)
    report = gate.as_dict(True)
    assert report["tokens"] == [[7, 40, None, None, 0, 0, 0], [8, 42, 0.5, None, 0, 0, 0]]
    assert (report["draws"], report["refusals"], report["fallbacks"]) == (0, 0, 0)


def gated() -> Gate:
    """Four tokens: no history, taken, one refused, all refused."""
    gate = Gate(RULE, 0)
    gate.decide(7, [5, 6], [1, 0], [math.nan, math.nan])
    gate.decide(8, [5, 6], [0, 1], [0.5, 0.25])
    gate.decide(9, [5, 6, 7], [2, 0, 1], [0.75, 1.0, 0.125])
    gate.decide(10, [5, 6, 7], [2, 0, 1], [0.125, 0.25, 0.125])
    return gate


def test_the_report_sums_up_and_lists():
    report = gated().as_dict(True)
    assert (report["draws"], report["refusals"], report["fallbacks"]) == (6, 3, 1)
    assert report["tokens"] == [
        [7, 6, None, None, 1, 0, 0],
        [8, 5, 0.5, 0.0, 1, 0, 0],
        [9, 5, 0.75, 0.25, 2, 1, 0],
        [10, 6, 0.25, 0.3125, 2, 2, 1],
    ]
    assert gated().as_dict(False) == {**report, "tokens": []}


def test_the_list_of_tokens_ends_somewhere_and_the_sums_do_not(monkeypatch):
    monkeypatch.setattr(sampling_gate, "MAX_TOKENS", 2)
    report = gated().as_dict(True)
    assert [token[0] for token in report["tokens"]] == [7, 8]
    assert (report["draws"], report["refusals"], report["fallbacks"]) == (6, 3, 1)


def program(rule: SamplingGate | None = RULE, *readouts: Readout) -> SteeringProgram:
    saliency = SaliencyRule((0,), QueryScope.OUTPUT)
    return SteeringProgram(saliency=saliency, sampling_gate=rule, readouts=readouts)


def test_a_gate_takes_seed_and_end_tokens_from_the_request():
    gates = Gates()
    sampling = SamplingParams(seed=9, stop_token_ids=[3, 4])
    sampling.update_from_generation_config({"eos_token_id": [2]}, 1)
    gates.add("a", "a", program(), sampling)
    gates.add("b", "b", program(None), None)
    gate = gates.of_request["a"]
    assert (gate.rule, gate.seed, gate.end_tokens) == (RULE, 9, {1, 2, 3, 4})
    assert (gates.of_request["b"].rule, gates.of_request["b"].end_tokens) == (None, frozenset())


def test_a_sequence_that_comes_back_keeps_its_gate():
    gates = Gates()
    gates.add("a", "a", program(), SamplingParams())
    gate = gates.of_request["a"]
    gate.decide(7, [5], [0], [0.5])
    gates.add("a", "a", program(), SamplingParams())
    assert gates.of_request["a"] is gate
    assert [each["draws"] for each in gates.pop_report("a")] == [1]


def test_a_report_has_all_its_sequences_once():
    gates, full = Gates(), program(RULE, Readout.SALIENCY)
    steered: list[tuple[str, str, Any]] = [
        ("x0", "x", full), ("x1", "x", full), ("y", "y", program()),
    ]  # fmt: skip
    for name, report_id, each in steered:
        gates.add(name, report_id, each, None)
        gates.of_request[name].decide(7, [int(name[-1] == "1")], [0], [0.5])
    for name, _, _ in steered:
        gates.remove(name)
    gates.remove("never came")
    assert gates.of_request == {}
    tokens = [each["tokens"] for each in gates.pop_report("x")]
    assert tokens == [[[7, 0, 0.5, 0.0, 1, 0, 0]], [[7, 1, 0.5, 0.0, 1, 0, 0]]]
    assert gates.pop_report("x") == []
    assert gates.pop_report("y") == [{"draws": 1, "refusals": 0, "fallbacks": 0, "tokens": []}]
