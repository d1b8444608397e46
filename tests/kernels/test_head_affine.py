"""The head-affine kernel against its reference, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.head_affine import head_affine_, head_affine_reference

pytestmark = pytest.mark.unit

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@st.composite
def problems(draw):
    """(z, rows, scale, shift): a batch, the rows to edit and their edits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, heads = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    size = draw(st.sampled_from([1, 16, 64, 80, 128]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    z = torch.randn(tokens, heads, size, generator=generator).to(dtype)
    if draw(st.booleans()):
        start = draw(st.integers(0, tokens - 1))
        rows = slice(start, draw(st.integers(start + 1, tokens)))
    else:
        chosen = draw(st.sets(st.integers(0, tokens - 1), min_size=1))
        rows = torch.tensor(sorted(chosen))
    count = len(z[rows])
    scale = torch.randn(count, heads, generator=generator) * 3
    shift = torch.randn(count, heads, size, generator=generator) if draw(st.booleans()) else None
    return z, rows, scale, shift


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_reference_and_leaves_other_rows_alone(problem):
    z, rows, scale, shift = problem
    before = z.clone()
    expected = head_affine_reference(z[rows], scale, shift)
    head_affine_(z, rows, scale, shift)
    tolerance = TOLERANCE[z.dtype]
    torch.testing.assert_close(z[rows].float(), expected, rtol=tolerance, atol=tolerance)
    others = torch.ones(len(z), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(z[others], before[others])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([0, 3])])
def test_scale_one_keeps_every_bit(dtype, rows):
    z = torch.randn(4, 3, 64).to(dtype)
    z[0, 0, 0] = -0.0
    before = z.clone()
    head_affine_(z, rows, torch.ones(2, 3))
    assert torch.equal(z.view(torch.uint8), before.view(torch.uint8))


def test_scale_zero_silences_a_head():
    z = torch.randn(2, 3, 8)
    scale = torch.ones(2, 3)
    scale[:, 1] = 0
    head_affine_(z, slice(0, 2), scale)
    assert z[:, 1].abs().sum() == 0
    assert z[:, 0].abs().sum() > 0


@pytest.mark.parametrize("rows", [slice(0, 2), torch.tensor([0, 2])])
@pytest.mark.parametrize("with_shift", [False, True])
def test_a_bad_edit_writes_nothing(rows, with_shift):
    z = torch.randn(3, 3, 8)
    before = z.clone()
    shift = torch.zeros(2, 5, 8) if with_shift else None
    with pytest.raises(RuntimeError):
        head_affine_(z, rows, torch.ones(2, 5), shift)
    assert torch.equal(z, before)
