"""The Triton residual-edit kernel against its reference, and the rows it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.residual_edit import Form, residual_edit_reference
from headway.kernels.triton import residual_edit
from headway.kernels.triton.residual_edit import residual_edit_

pytestmark = pytest.mark.unit

# Triton's interpreter cuts bfloat16 off where a GPU rounds, so an error may be a whole last place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
NUM_SLOTS = 4
NUM_EDITS = 3


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().view(torch.uint8)


@st.composite
def problems(draw):
    """The arguments of residual_edit_; NaN in rows without an edit, and in the edit not used."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    table = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tokens, clusters = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    hidden_size = draw(st.sampled_from([8, 36, 100]))
    hidden_states = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    # Slots in an order of their own, some without an edit; -1 is a row that nobody steers.
    slot_edits = int32([draw(st.integers(-1, NUM_EDITS - 2)) for _ in range(NUM_SLOTS)])
    row_slots = int32([draw(st.integers(-1, NUM_SLOTS - 1)) for _ in range(tokens)])
    hidden_states[edits_of(row_slots, slot_edits) < 0] = float("nan")
    residual = None
    if draw(st.booleans()):
        residual = 10 * torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    shape = (NUM_EDITS, clusters, hidden_size)
    probe_weights = torch.randn(shape, generator=generator).to(table)
    directions = torch.randn(shape, generator=generator).to(table)
    probe_weights[-1] = directions[-1] = float("nan")
    probe_bias = torch.randn(NUM_EDITS, clusters, generator=generator)
    if clusters > 1 and draw(st.booleans()):
        unused = draw(st.integers(0, clusters - 1))
        probe_bias[:, unused] = -math.inf
        directions[:, unused] = float("nan")
    strengths = torch.randn(NUM_SLOTS, generator=generator)
    forms = int32([int(draw(st.sampled_from(Form))) for _ in range(NUM_SLOTS)])
    tables = slot_edits, strengths, forms, probe_weights, probe_bias, directions
    return hidden_states, residual, row_slots, *tables


def edits_of(row_slots: torch.Tensor, slot_edits: torch.Tensor) -> torch.Tensor:
    return torch.where(row_slots >= 0, slot_edits[row_slots.clamp_min(0).long()], -1)


@settings(max_examples=25, deadline=None)
@given(problems(), st.booleans())
def test_equals_reference_and_leaves_other_rows_alone(problem, in_blocks):
    hidden_states, residual, row_slots, slot_edits, strengths, forms, *tables = problem
    probe_weights, probe_bias, directions = tables
    before = hidden_states.clone()
    with pytest.MonkeyPatch.context() as patch:
        if in_blocks:
            patch.setattr(residual_edit, "MAX_BLOCK", 16)
        residual_edit_(*problem)
    for row, edit in enumerate(edits_of(row_slots, slot_edits).tolist()):
        if edit < 0:
            assert torch.equal(bits(hidden_states[row]), bits(before[row]))
            continue
        stream = before[row : row + 1].float()
        if residual is not None:
            stream = stream + residual[row : row + 1].float()
        added = residual_edit_reference(
            stream,
            float(strengths[row_slots[row]]),
            probe_weights[edit],
            probe_bias[edit],
            directions[edit],
            Form(int(forms[row_slots[row]])),
        )
        tolerance = TOLERANCE[before.dtype]
        expected = before[row : row + 1].float() + added
        torch.testing.assert_close(
            hidden_states[row : row + 1].float(), expected, rtol=tolerance, atol=1e-5
        )


def one_edit(strength: float, form: Form = Form.RMS) -> tuple[torch.Tensor, ...]:
    """Row 0 of the stream points at cluster 1 of 3, whose direction is the second unit vector."""
    probe_weights = torch.zeros(1, 3, 4)
    probe_weights[0, 1, 0] = 1
    strengths, forms = torch.tensor([strength]), int32([int(form)])
    return (
        int32([0]),
        strengths,
        forms,
        probe_weights,
        torch.zeros(1, 3),
        torch.eye(3, 4).unsqueeze(0),
    )


def test_the_strength_is_in_units_of_rms():
    hidden_states = torch.tensor([[6.0, 0, 0, 0]])  # rms 3
    residual_edit_(hidden_states, None, int32([0]), *one_edit(0.5))
    assert hidden_states.tolist() == [[6, 1.5, 0, 0]]


def test_the_residual_is_read_and_not_written():
    hidden_states, residual = torch.zeros(1, 4), torch.tensor([[6.0, 0, 0, 0]])
    residual_edit_(hidden_states, residual, int32([0]), *one_edit(0.5))
    assert hidden_states.tolist() == [[0, 1.5, 0, 0]]
    assert residual.tolist() == [[6, 0, 0, 0]]


def test_of_equal_logits_the_first_counts():
    hidden_states = torch.full((1, 4), 2.0)
    edits, strengths, forms, probe_weights, *rest = one_edit(1.0)
    tables = edits, strengths, forms, 0 * probe_weights, *rest
    residual_edit_(hidden_states, None, int32([0]), *tables)
    assert hidden_states.tolist() == [[4, 2, 2, 2]]


def test_a_direction_is_added_to_a_row_of_zeros():
    hidden_states = torch.zeros(1, 4)
    residual_edit_(hidden_states, None, int32([0]), *one_edit(0.5, Form.ADD))
    assert hidden_states.tolist() == [[0.5, 0, 0, 0]]  # of equal logits the first counts


def test_a_direction_is_removed():
    hidden_states = torch.tensor([[6.0, 2, 1, 0]])
    residual_edit_(hidden_states, None, int32([0]), *one_edit(1.0, Form.REMOVE))
    assert hidden_states.tolist() == [[6, 0, 1, 0]]


@pytest.mark.parametrize("row, strength", [([-0.0, 1, 1, 1], 0.0), ([0.0, -0.0, 0, 0], 1.0)])
def test_rows_with_nothing_to_add_keep_their_bits(row, strength):
    hidden_states = torch.tensor([row])
    before = hidden_states.clone()
    residual_edit_(hidden_states, None, int32([0]), *one_edit(strength))
    assert torch.equal(bits(hidden_states), bits(before))


def test_a_row_of_infinities_reads_no_cluster_that_does_not_exist():
    hidden_states = torch.full((1, 4), math.inf)
    residual_edit_(hidden_states, None, int32([0]), *one_edit(1.0))
    assert not hidden_states.isfinite().any()


def test_shapes_that_do_not_fit_are_refused():
    edit = one_edit(1.0)
    with pytest.raises(ValueError, match="one shape"):
        residual_edit_(torch.zeros(2, 4), torch.zeros(1, 4), int32([0, 0]), *edit)
    with pytest.raises(ValueError, match="2 rows"):
        residual_edit_(torch.zeros(2, 4), None, int32([0]), *edit)
    with pytest.raises(ValueError, match="num_clusters"):
        residual_edit_(torch.zeros(2, 8), None, int32([0, 0]), *edit)
