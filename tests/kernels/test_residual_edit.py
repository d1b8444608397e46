"""The residual edit on CPU against the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.residual_edit import residual_edit_, residual_edit_reference

pytestmark = pytest.mark.unit


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_equals_the_formula_and_leaves_other_rows_alone(seed, clusters, dtype, has_residual):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 24, generator=draw).to(dtype)
    residual = 5 * torch.randn(7, 24, generator=draw).to(dtype) if has_residual else None
    rows = torch.randperm(7, generator=draw)[:4]
    strengths = torch.randn(4, generator=draw)
    tables = [torch.randn(clusters, 24, generator=draw) for _ in range(2)]
    bias = torch.randn(clusters, generator=draw)
    if clusters > 1:
        bias[-1] = -torch.inf
    weights, directions = tables
    before = hidden.clone()
    residual_edit_(hidden, residual, rows, strengths, weights, bias, directions)
    untouched = torch.ones(7, dtype=torch.bool)
    for row, strength in zip(rows.tolist(), strengths.tolist(), strict=True):
        untouched[row] = False
        stream = before[row : row + 1].float()
        if residual is not None:
            stream = stream + residual[row : row + 1].float()
        added = residual_edit_reference(stream, strength, weights, bias, directions)[0]
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        expected = before[row].float() + added
        torch.testing.assert_close(hidden[row].float(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(hidden[untouched], before[untouched])


def test_a_row_of_zeros_stays():
    hidden = torch.zeros(1, 8)
    vectors = torch.ones(1, 8), torch.zeros(1), torch.ones(1, 8)
    residual_edit_(hidden, None, torch.tensor([0]), torch.ones(1), *vectors)
    assert (hidden == 0).all()
