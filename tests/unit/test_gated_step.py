"""The decisions of one step over a saliency source made by hand, and whose failure is whose."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.server.engine import cpu_sampling
from headway.server.engine.cpu_plan import CpuPlanner
from headway.server.engine.cpu_sampling import GatedStep, _replace
from headway.server.engine.saliency_tape import SaliencyRow
from headway.server.engine.sampling_gate import Gate
from headway.server.engine.slots import SlotTables
from headway.server.engine.steering_state import SteeringState
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.positions import END, PromptFacts
from headway.steering.program import SamplingGate
from headway.steering.wire import encode_facts, encode_program

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, hidden_size=32)
RULE = SamplingGate(0.9, 5, 3, 3)
VOCABULARY, PROMPT_LEN = 30, 4


def row(index: int, name: str, position: int) -> SaliencyRow:
    history = ((PROMPT_LEN, END),)
    return SaliencyRow(name, index, index, position, PROMPT_LEN, -1, -1, (1,), history)


class Source:
    """Drawn saliencies, a function of request, position and token alone; keeps what was asked.

    broken: request -> what its saliencies are, or raise; from the `late`-th call on.
    """

    def __init__(self, rows: list[SaliencyRow], late: int = 0, **broken: Any) -> None:
        self.tape = SimpleNamespace(rows=tuple(rows), seconds=0.0)
        self.broken, self.late = broken, late
        self.asked: list[dict[int, list[int]]] = []

    def value(self, index: int, token: int) -> float:
        row = self.tape.rows[index]
        found = self.broken.get(row.request_id) if len(self.asked) > self.late else None
        if isinstance(found, Exception):
            raise found
        if found is not None:
            return found
        seed = hash((ord(row.request_id[0]), row.position))
        return float(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed))[token])

    def saliencies(self, chosen: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        asked = dict(zip(chosen.tolist(), candidates.tolist(), strict=True))
        self.asked.append(asked)
        return torch.tensor(
            [[self.value(index, token) for token in each] for index, each in asked.items()]
        )


def logits_of(*rows: SaliencyRow) -> torch.Tensor:
    draws = [
        torch.Generator().manual_seed(each.position + ord(each.request_id[0])) for each in rows
    ]
    return torch.stack([2 * torch.randn(VOCABULARY, generator=draw) for draw in draws])


def run(
    gates: dict[str, Gate], positions: dict[str, int], greedy: frozenset[str] = frozenset()
) -> tuple[dict[str, int], Source]:
    """One step: the token of each request, and the source that was asked. vLLM would take 29."""
    rows = [row(index, name, position) for index, (name, position) in enumerate(positions.items())]
    source: Any = Source(rows)
    is_greedy = torch.tensor([each.request_id in greedy for each in rows])
    own = [gates[each.request_id] for each in rows]
    step = GatedStep(source, range(len(rows)), own, logits_of(*rows), is_greedy)
    taken = step.take(torch.full((len(rows),), VOCABULARY - 1))
    assert taken.dtype is torch.int64 and taken.shape == (len(rows),)
    return dict(zip(positions, taken.tolist(), strict=True)), source


def new_gates(names: str, seed: int = 0, rule: SamplingGate | None = RULE) -> dict[str, Gate]:
    return {name: Gate(rule, seed + index) for index, name in enumerate(names)}


def alone(gate: Gate, name: str, position: int, greedy: bool) -> int:
    """The token of a request by the rule, all its saliencies being known."""
    each = row(0, name, position)
    assert gate.rule is not None
    logits, tokens = logits_of(each)[0].sort(descending=True)
    shares = logits[: gate.rule.top_k].softmax(0).double().numpy()
    order = gate.order(shares, position + 1, greedy)
    source = Source([each])
    known = [source.value(0, token) for token in tokens.tolist()]
    if position < PROMPT_LEN:
        known = [math.nan] * VOCABULARY
    found = gate.decide(position + 1, tokens.tolist(), order, known)
    assert found is not None
    return found.token_id


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([0, 5, 10**6]))
def test_a_token_hangs_on_nothing_but_its_own_sequence(data, at_once):
    """Drawn batches, computed lazily, at once, or as it is: always what the rule alone gives."""
    names, seed = "abcd", data.draw(st.integers(0, 1000))
    greedy = data.draw(st.frozensets(st.sampled_from(names)))
    gates, other = new_gates(names, seed), new_gates(names, seed)
    next_position = dict.fromkeys(names, PROMPT_LEN - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sampling, "AT_ONCE", at_once)
        for _ in range(6):
            present = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            positions = {name: next_position[name] for name in present}
            taken, _ = run(gates, positions, greedy)
            for name, position in positions.items():
                assert taken[name] == alone(other[name], name, position, name in greedy)
                next_position[name] += 1
    for name in names:
        assert gates[name].accepted == other[name].accepted


def test_many_rows_are_asked_for_no_more_than_they_need():
    """First the first drawn of every row, then what is left of those that refused it."""
    names = "abcdefgh"
    gates, refused, fell_back = new_gates(names), 0, 0
    for position in range(PROMPT_LEN, PROMPT_LEN + 8):
        _, source = run(gates, dict.fromkeys(names, position))
        first, *later = source.asked
        assert list(first) == list(range(8)) and {len(each) for each in first.values()} == {1}
        decisions = [gates[name].accepted[-1] for name in names]
        unhappy = [index for index, each in enumerate(decisions) if each.refusals]
        assert [sorted(each) for each in later] == [unhappy] * bool(unhappy)
        for index in unhappy:
            asked = [*first[index], *later[0][index]]
            assert len(set(asked)) == len(asked) == RULE.top_k
        refused += len(unhappy)
        fell_back += sum(each.fallback for each in decisions)
    assert refused > 10 and fell_back > 2


def test_rows_with_fewer_candidates_are_filled_up():
    gates = {"a": Gate(SamplingGate(9.0, 2, 1, 1), 1), "b": Gate(SamplingGate(9.0, 5, 2, 1), 1)}
    for position in range(PROMPT_LEN, PROMPT_LEN + 3):
        _, source = run(gates, {"a": position, "b": position})
    of_a, of_b = source.asked[1][0], source.asked[1][1]
    assert len(of_a) == len(of_b) == 4 and len(set(of_a)) == 1 and len(set(of_b)) == 4
    assert of_a[0] not in source.asked[0][0]


def test_one_row_is_asked_for_all_its_candidates_at_once():
    _, source = run(new_gates("a"), {"a": PROMPT_LEN + 2})
    (asked,) = source.asked
    top = logits_of(row(0, "a", PROMPT_LEN + 2))[0].topk(RULE.top_k).indices
    assert asked == {0: top.tolist()}


def test_without_history_the_first_drawn_is_taken_and_nothing_computed():
    orders = set()
    for seed in range(40):
        gates = new_gates("ab", seed)
        taken, source = run(gates, {"a": PROMPT_LEN - 1, "b": 0}, frozenset("b"))
        assert source.asked == []
        top = logits_of(row(0, "a", PROMPT_LEN - 1))[0].topk(RULE.top_k)
        order = gates["a"].order(top.values.softmax(0).double().numpy(), PROMPT_LEN, False)
        assert taken["a"] == top.indices[order[0]]
        assert taken["b"] == logits_of(row(0, "b", 0))[0].argmax()
        assert gates["a"].accepted[0].as_list() == [PROMPT_LEN, taken["a"], None, None, 1, 0, 0]
        orders.add(taken["a"])
    assert len(orders) > 1


def test_what_is_only_read_keeps_its_token():
    gates = new_gates("ab", rule=None)
    for position in (PROMPT_LEN - 1, PROMPT_LEN):
        taken, source = run(gates, {"a": position, "b": position})
        assert taken == {"a": VOCABULARY - 1, "b": VOCABULARY - 1}
    assert source.asked == [{0: [VOCABULARY - 1], 1: [VOCABULARY - 1]}]
    for index, name in enumerate("ab"):
        value = source.value(index, VOCABULARY - 1)
        assert gates[name].as_dict(True)["tokens"] == [
            [PROMPT_LEN, VOCABULARY - 1, None, None, 0, 0, 0],
            [PROMPT_LEN + 1, VOCABULARY - 1, value, None, 0, 0, 0],
        ]


def test_candidates_without_probability_are_neither_asked_for_nor_taken():
    each = row(0, "a", PROMPT_LEN + 1)
    for seed in range(20):
        logits = torch.full((1, VOCABULARY), -math.inf)
        logits[0, [4, 9]] = torch.tensor([1.0, 2.0])
        source: Any = Source([each])
        gate = Gate(SamplingGate(2.0, 5, 3, 1), seed)
        gate.decide(PROMPT_LEN + 1, [1], [0], [1.0])  # then all are refused
        step = GatedStep(source, [0], [gate], logits, torch.tensor([False]))
        token = int(step.take(torch.tensor([0])))
        assert sorted(source.asked[0][0]) == [4, 9] and gate.accepted[-1].fallback
        assert token == max([4, 9], key=lambda token: source.value(0, token))


def test_equally_likely_candidates_come_as_vllm_takes_them():
    """vLLM's argmax takes the lowest of equals, which a bfloat16 model has often."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, 1000, generator=draw)
        logits[0, torch.randperm(1000, generator=draw)[:3]] = 9.0
        source: Any = Source([row(0, "a", 0)])
        step = GatedStep(source, [0], [Gate(RULE, 0)], logits, torch.tensor([True]))
        assert step.take(torch.tensor([0])).tolist() == logits.argmax(-1).tolist()


def steering(names: str) -> SteeringState:
    state = SteeringState(GEOMETRY, CpuPlanner(SlotTables(GEOMETRY, 8)))
    program = compile_spec(parse_spec({"methods": [{"method": "sgrs"}]}), GEOMETRY)
    payload = {**encode_program(program), "facts": encode_facts(PromptFacts(PROMPT_LEN))}
    for name in names:
        state.add(name, {"report_id": name, **payload})
        state.gates.of_request[name].seed = ord(name)
    return state


def replaced(state: SteeringState, rows: list[SaliencyRow], **broken: Any) -> torch.Tensor:
    """What `_replace` makes of the tokens of 5 sequences; row r is sequence r + 1."""
    sampled = torch.full((5,), VOCABULARY + 1)
    drawn = logits_of(*rows), torch.zeros(len(rows), dtype=torch.bool)
    source: Any = Source(rows, **broken)
    _replace(state, source, drawn, sampled, torch.arange(1, len(rows) + 1))
    return sampled


@pytest.mark.parametrize("value", [math.nan, math.inf, KeyError(7)], ids=str)
@pytest.mark.parametrize("late", [0, 1])
def test_a_failure_is_that_of_one_request(value, late):
    """late: what others have decided by then is decided once more, to the same end."""
    rows = [row(index + 1, name, PROMPT_LEN + 3) for index, name in enumerate("abc")]
    well, ill = steering("abc"), steering("abc")
    for state, name in itertools.product((well, ill), "abc"):
        # One that all candidates fall short of, for all of them to be asked for, later.
        state.gates.of_request[name].decide(PROMPT_LEN + 3, [1], [0], [late * 9.0])
    want, got = replaced(well, rows), replaced(ill, rows, late=late, b=value)
    assert well.take_failed() == () and ill.take_failed() == ("b",)
    untouched = VOCABULARY + 1
    assert [token == untouched for token in want.tolist()] == [True, False, False, False, True]
    assert got.tolist() == [*want[:2].tolist(), untouched, *want[3:].tolist()]
    for name in "ac":
        assert ill.gates.of_request[name].accepted == well.gates.of_request[name].accepted
        assert ill.pop_report(name).failed_stage is None
    report = ill.pop_report("b")
    assert report.failed_stage == "sampling" and report.saliency[0]["draws"] == 1
    error = (
        "KeyError: 7"
        if isinstance(value, KeyError)
        else f"FloatingPointError: a saliency of {value}"
    )
    assert report.failure == error


def test_a_request_without_its_gate_fails_alone():
    rows = [row(index + 1, name, PROMPT_LEN + 3) for index, name in enumerate("abc")]
    state = steering("abc")
    state.gates.remove("c")
    want = replaced(steering("abc"), rows)
    got = replaced(state, rows)
    assert state.take_failed() == ("c",)
    assert got.tolist() == [*want[:3].tolist(), VOCABULARY + 1, VOCABULARY + 1]
