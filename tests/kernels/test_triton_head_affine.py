"""The Triton head-affine kernel against the reference, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.head_affine import head_affine_reference
from headway.kernels.head_word import Field
from headway.kernels.triton.head_affine import head_affine_

pytestmark = pytest.mark.unit

# Triton's interpreter cuts bfloat16 off where a GPU rounds, so an error may be a whole last place.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CAPACITY = 3


def bits(z: torch.Tensor) -> torch.Tensor:
    return z.flatten().view(torch.uint8)


def identity_words(capacity: int, num_heads: int) -> torch.Tensor:
    """Words that change nothing, with columns of other edits that this kernel must not read."""
    words = torch.full((capacity, num_heads, len(Field) + 4), float("nan"))
    words[..., Field.SCALE] = 1
    words[..., Field.SHIFT_INDEX] = -1
    return words


@st.composite
def problems(draw):
    """(z, row_slots, words, shifts): NaN wherever the kernel has no business."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 16, 64, 80, 96]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    z = torch.randn(tokens, heads, size + 3, generator=generator).to(dtype)[..., :size]
    slot = st.integers(-1, CAPACITY - 1)
    row_slots = draw(st.lists(slot, min_size=tokens, max_size=tokens + 2))
    words = identity_words(CAPACITY, heads)
    words[..., Field.SCALE] = torch.randn(CAPACITY, heads, generator=generator) * 3
    words[..., Field.SHIFT_INDEX] = torch.randint(-1, 2, (CAPACITY, heads), generator=generator)
    shifts = torch.randn(2, size, generator=generator) if draw(st.booleans()) else None
    row_slots = torch.tensor(row_slots, dtype=torch.int32)
    z[row_slots[:tokens] < 0] = float("nan")
    return z, row_slots, words, shifts


@settings(max_examples=25, deadline=None)
@given(problems())
def test_equals_reference_and_leaves_other_rows_alone(problem):
    z, row_slots, words, shifts = problem
    before = z.clone()
    steered = row_slots[: len(z)] >= 0
    edit = words[row_slots[: len(z)][steered].long()]
    shift = None
    if shifts is not None:
        index = edit[..., Field.SHIFT_INDEX].long()
        shift = shifts[index.clamp(min=0)] * (index >= 0).unsqueeze(-1)
    expected = head_affine_reference(before[steered], edit[..., Field.SCALE], shift)
    head_affine_(z, row_slots, words, shifts)
    tolerance = TOLERANCE[z.dtype]
    torch.testing.assert_close(z[steered].float(), expected, rtol=tolerance, atol=1e-6)
    assert torch.equal(bits(z[~steered]), bits(before[~steered]))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_only_heads_with_an_edit_are_touched(dtype):
    z = torch.randn(2, 4, 80).to(dtype)
    z[:, 0] = float("nan")
    z[0, 2, 0] = -0.0
    before = z.clone()
    words = identity_words(1, 4)
    words[0, 1, Field.SCALE] = 0
    words[0, 3, Field.SHIFT_INDEX] = 1
    shifts = torch.stack([torch.full((80,), float("nan")), torch.full((80,), 2.0)])
    head_affine_(z, torch.zeros(2, dtype=torch.int32), words, shifts)
    assert torch.equal(bits(z[:, [0, 2]]), bits(before[:, [0, 2]]))
    assert z[:, 1].abs().sum() == 0
    expected = before[:, 3].float() + 2
    torch.testing.assert_close(z[:, 3].float(), expected, rtol=TOLERANCE[dtype], atol=1e-6)


def test_is_rounded_once():
    z = torch.ones(1, 1, 16, dtype=torch.bfloat16)
    words = identity_words(1, 1)
    words[..., Field.SCALE] = 1 + 2**-8
    words[..., Field.SHIFT_INDEX] = 0
    head_affine_(z, torch.zeros(1, dtype=torch.int32), words, torch.full((1, 16), 2**-8))
    assert torch.all(z == 1 + 2**-7)  # rounded after the scale as well, it would stay 1


def test_without_shifts_the_index_is_not_looked_at():
    z = torch.randn(1, 1, 16)
    before = z.clone()
    words = identity_words(1, 1)
    words[..., Field.SHIFT_INDEX] = 7
    head_affine_(z, torch.zeros(1, dtype=torch.int32), words)
    assert torch.equal(z, before)


def test_no_tokens_is_nothing_to_do():
    head_affine_(torch.empty(0, 2, 16), torch.empty(0, dtype=torch.int32), identity_words(1, 2))


@pytest.mark.parametrize("row_slots, heads", [(1, 3), (2, 4)])
def test_shapes_that_do_not_fit_are_refused(row_slots, heads):
    with pytest.raises(ValueError, match="do not fit"):
        head_affine_(
            torch.zeros(2, 3, 16),
            torch.zeros(row_slots, dtype=torch.int32),
            identity_words(1, heads),
        )
