"""The residual edit on CPU against the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import residual_edit
from headway.kernels.residual_edit import (
    Edit,
    Form,
    RowEdits,
    residual_edit_,
    residual_edit_reference,
)
from tests.kernels.threads import threads

pytestmark = pytest.mark.unit

HIDDEN, TOKENS = 44, 9


def drawn_edit(draw: torch.Generator, clusters: int, form: Form) -> Edit:
    """Vectors of an edit; of one direction there is nothing to pick."""
    directions, weights = (torch.randn(clusters, HIDDEN, generator=draw) for _ in range(2))
    bias = torch.randn(clusters, generator=draw)
    strength = float(torch.randn(1, generator=draw))
    if clusters == 1:
        return Edit(directions, strength, form)
    return Edit(directions, strength, form, weights, bias)


def expected(edit: Edit, stream: torch.Tensor) -> torch.Tensor:
    weights, bias = edit.probe_weights, edit.probe_bias
    if weights is None:
        weights, bias = torch.zeros_like(edit.directions), torch.zeros(1)
    args = stream, edit.strength, weights, bias, edit.directions, edit.form
    return residual_edit_reference(*args)[0]


@pytest.fixture(params=["compiled", "torch"])
def how(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(residual_edit, "compiled_library", lambda name: None)
    elif residual_edit.compiled_library("residual_edit") is None:
        pytest.skip("the kernel was not built")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_residual", [False, True])
def test_equals_the_formula_and_leaves_other_rows_alone(how, dtype, has_residual):
    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(0, 10**6),
        st.lists(st.tuples(st.integers(1, 16), st.sampled_from(Form)), min_size=1, max_size=4),
    )
    def holds(seed, kinds):
        draw = torch.Generator().manual_seed(seed)
        hidden = torch.randn(TOKENS, HIDDEN, generator=draw).to(dtype)
        residual = 5 * torch.randn(TOKENS, HIDDEN, generator=draw) if has_residual else None
        residual = None if residual is None else residual.to(dtype)
        rows = torch.randperm(TOKENS, generator=draw)[:6]
        which = torch.randint(len(kinds), (6,), generator=draw)
        edits = [drawn_edit(draw, clusters, form) for clusters, form in kinds]
        before = hidden.clone()
        residual_edit_(hidden, residual, RowEdits(rows, which, edits))
        untouched = torch.ones(TOKENS, dtype=torch.bool)
        for row, index in zip(rows.tolist(), which.tolist(), strict=True):
            untouched[row] = False
            stream = before[row : row + 1].float()
            if residual is not None:
                stream = stream + residual[row : row + 1].float()
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2
            wanted = before[row].float() + expected(edits[index], stream)
            torch.testing.assert_close(hidden[row].float(), wanted, atol=tolerance, rtol=tolerance)
        assert torch.equal(hidden[untouched], before[untouched])

    holds()


@pytest.mark.parametrize("form", Form)
def test_a_row_of_zeros(how, form):
    """It has no rms to add in units of, and nothing to remove."""
    hidden, index = torch.zeros(1, 8), torch.tensor([0])
    residual_edit_(hidden, None, RowEdits(index, index, [Edit(torch.ones(1, 8), 0.5, form)]))
    assert (hidden == (0.5 if form is Form.ADD else 0.0)).all()


def test_removing_a_direction_leaves_nothing_of_it(how):
    draw = torch.Generator().manual_seed(3)
    hidden, direction = (torch.randn(1, HIDDEN, generator=draw) for _ in range(2))
    index = torch.tensor([0])
    residual_edit_(hidden, None, RowEdits(index, index, [Edit(direction, 1.0, Form.REMOVE)]))
    assert abs(float((hidden @ direction.T).squeeze())) < 1e-4
    before = hidden.clone()
    zero = [Edit(torch.zeros(1, HIDDEN), 1.0, Form.REMOVE)]
    residual_edit_(hidden, None, RowEdits(index, index, zero))
    assert torch.equal(hidden, before)


def test_a_row_that_cannot_be_compared_takes_the_first_direction(how):
    hidden = torch.full((2, HIDDEN), float("nan"))
    draw = torch.Generator().manual_seed(0)
    index = torch.tensor([0])
    residual_edit_(hidden, None, RowEdits(index, index, [drawn_edit(draw, 3, Form.RMS)]))
    assert hidden.isnan().all()


def test_a_row_depends_on_neither_the_others_nor_the_threads():
    draw = torch.Generator().manual_seed(1)
    size = 4096
    hidden = torch.randn(64, size, generator=draw)
    vectors = [torch.randn(5, size, generator=draw) for _ in range(2)]
    table = [Edit(vectors[0], 0.3, Form.RMS, vectors[1], torch.zeros(5))]
    together, rows = hidden.clone(), torch.arange(64)
    with threads(2):
        residual_edit_(together, None, RowEdits(rows, torch.zeros_like(rows), table))
    alone, index = hidden.clone(), torch.tensor([17])
    with threads(1):
        residual_edit_(alone, None, RowEdits(index, torch.tensor([0]), table))
    assert torch.equal(together[17], alone[17])


def test_vectors_must_be_contiguous():
    with pytest.raises(ValueError, match="contiguous"):
        index = torch.tensor([0])
        RowEdits(index, index, [Edit(torch.randn(8, 2).T, 1.0)])
