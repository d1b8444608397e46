"""The Triton sink-tag kernel against the rule, and the slots it must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.head_word import Tag
from headway.kernels.sink_tags import sink_flags_reference
from headway.kernels.triton import sink_tags
from headway.kernels.triton.sink_tags import tag_sinks_

pytestmark = pytest.mark.unit

UNTOUCHED = 77
NUM_SLOTS = 24


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def problems(draw):
    """The arguments of tag_sinks_ after slot_tags, with rows that no rule decides NaN."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tokens, hidden_size = draw(st.integers(1, 5)), draw(st.sampled_from([8, 36, 100]))
    hidden_states = torch.randn(tokens, hidden_size, generator=generator)
    num_rules, max_dims = 3, draw(st.integers(1, 3))
    dims = st.lists(st.integers(-1, hidden_size - 1), min_size=max_dims, max_size=max_dims)
    rule_dims = [draw(dims) for _ in range(num_rules)]
    rule_tau = [draw(st.sampled_from([-1.0, 0.5, 1.0, 2.0])) for _ in range(num_rules)]
    row_rules = [draw(st.integers(-1, num_rules - 1)) for _ in range(tokens)]
    slots = torch.randperm(NUM_SLOTS, generator=generator)[: tokens + 1]
    slots[torch.rand(tokens + 1, generator=generator) < 0.2] = -1
    for row, rule in enumerate(row_rules):
        if rule < 0 or rule_tau[rule] < 0 or slots[row] < 0:
            hidden_states[row] = float("nan")
    residual = None
    if draw(st.booleans()):
        residual = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    return (
        hidden_states.to(dtype),
        residual,
        slots,
        int32(row_rules),
        torch.tensor(rule_tau),
        int32(rule_dims),
    )


@settings(max_examples=25, deadline=None)
@given(problems(), st.booleans())
def test_equals_reference_and_leaves_other_slots_alone(problem, in_blocks):
    hidden_states, residual, slots, row_rules, rule_tau, rule_dims = problem
    stream = hidden_states.float() if residual is None else hidden_states.float() + residual
    expected = torch.full((NUM_SLOTS,), UNTOUCHED, dtype=torch.uint8)
    for row, rule in enumerate(row_rules.tolist()):
        if rule < 0 or rule_tau[rule] < 0 or slots[row] < 0:
            continue
        dims = [d for d in rule_dims[rule].tolist() if d >= 0]
        flag = sink_flags_reference(stream[row : row + 1], dims, float(rule_tau[rule]))
        expected[slots[row]] = int(Tag.SINK) * int(flag)
    slot_tags = torch.full((NUM_SLOTS,), UNTOUCHED, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        if in_blocks:
            patch.setattr(sink_tags, "MAX_BLOCK", 16)
        tag_sinks_(slot_tags, *problem)
    assert torch.equal(slot_tags, expected)


@pytest.mark.parametrize("tau, expected", [(4.0, Tag.SINK), (4.000001, 0)])
def test_a_peak_of_exactly_tau_is_a_sink(tau, expected):
    stream = torch.zeros(1, 16)
    stream[0, 3] = -4  # RMS 1
    slot_tags = torch.full((2,), UNTOUCHED, dtype=torch.uint8)
    tag_sinks_(
        slot_tags,
        stream,
        None,
        torch.tensor([1]),
        int32([0]),
        torch.tensor([tau]),
        int32([[3, -1]]),
    )
    assert slot_tags.tolist() == [UNTOUCHED, int(expected)]
    assert sink_flags_reference(stream, [3], tau).item() == (expected != 0)


def test_the_residual_counts():
    hidden_states, residual = torch.ones(1, 16), torch.zeros(1, 16)
    residual[0, 5] = 100
    slot_tags = torch.zeros(1, dtype=torch.uint8)
    rest = torch.tensor([0]), int32([0]), torch.tensor([3.0]), int32([[5]])
    tag_sinks_(slot_tags, hidden_states, None, *rest)
    assert slot_tags.item() == 0
    tag_sinks_(slot_tags, hidden_states, residual, *rest)
    assert slot_tags.item() == Tag.SINK


def test_shapes_that_do_not_fit_are_refused():
    slot_tags, stream = torch.zeros(4, dtype=torch.uint8), torch.zeros(2, 16)
    rules = torch.tensor([3.0]), int32([[5]])
    with pytest.raises(ValueError, match="one shape"):
        tag_sinks_(slot_tags, stream, stream[:1], torch.tensor([0, 1]), int32([0, 0]), *rules)
    with pytest.raises(ValueError, match="2 rows"):
        tag_sinks_(slot_tags, stream, None, torch.tensor([0]), int32([0, 0]), *rules)
