"""The Triton head selection against its reference, and the paper's rules one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.head_selection import select_heads_reference
from headway.kernels.head_word import Field
from headway.kernels.triton.head_selection import select_heads_

pytestmark = pytest.mark.unit


def selected(z: torch.Tensor, z_text: torch.Tensor, alpha: float = 2.0) -> torch.Tensor:
    scale = torch.full((z.shape[0],), float("nan"))
    select_heads_(scale, z, z_text, alpha)
    return scale


def one_column(differences: list[float], text: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads of one value with these VHD and, as its root, this TA."""
    z_text = torch.tensor(text).unsqueeze(1)
    return z_text + torch.tensor(differences).unsqueeze(1), z_text


@settings(max_examples=25, deadline=None)
@given(
    num_heads=st.sampled_from([1, 2, 5, 8, 9, 32]),
    head_size=st.sampled_from([8, 20, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    text_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    alpha=st.sampled_from([0.5, 2.0, 4.0]),
    outlier=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(num_heads, head_size, dtype, text_dtype, alpha, outlier, seed):
    generator = torch.Generator().manual_seed(seed)
    activity = 1 + torch.rand(num_heads, 1, generator=generator)
    activity[0] += 20 * outlier
    z_text = activity * torch.randn(num_heads, head_size, generator=generator)
    change = activity * torch.randn(num_heads, head_size, generator=generator)
    z, z_text = (z_text + change).to(dtype), z_text.to(text_dtype)
    assert torch.equal(selected(z, z_text, alpha), select_heads_reference(z, z_text, alpha))


@pytest.mark.parametrize("select", [selected, lambda *z: select_heads_reference(*z, 2.0)])
class TestRules:
    def test_heads_above_the_median_are_selected(self, select):
        z = one_column([1, 5, 3, 2, 4], [1, 1, 1, 1, 1])
        assert select(*z).tolist() == [1, 2, 1, 1, 2]

    def test_the_median_of_an_even_number_is_the_lower_one(self, select):
        assert select(*one_column([1, 2, 3, 4], [1, 1, 1, 1])).tolist() == [1, 1, 2, 2]

    def test_heads_at_the_median_are_not(self, select):
        assert select(*one_column([2, 2, 2, 5, 1], [1, 1, 1, 1, 1])).tolist() == [1, 1, 1, 2, 1]

    def test_an_outlier_of_both_kinds_counts_as_zero(self, select):
        # Its zero also moves the median: of 0 1 2 3 4 it is 2.
        assert select(*one_column([100, 1, 2, 3, 4], [9, 1, 1, 1, 1])).tolist() == [1, 1, 1, 2, 2]

    @pytest.mark.parametrize("text", [[1, 1, 1, 1, 1], [1, 1, 1, 1, 9]])
    def test_an_outlier_of_one_kind_does_not(self, select, text):
        assert select(*one_column([100, 1, 2, 3, 4], text)).tolist() == [2, 1, 1, 1, 2]

    def test_one_head_is_its_own_median(self, select):
        assert select(*one_column([3], [1])).tolist() == [1]


def test_writes_a_column_of_head_words_and_nothing_else():
    words = torch.full((2, 5, len(Field)), 7.0)
    z, z_text = one_column([1, 5, 3, 2, 4], [1, 1, 1, 1, 1])
    select_heads_(words[1, :, Field.SCALE], z, z_text, 3)
    assert words[1, :, Field.SCALE].tolist() == [1, 3, 1, 1, 3]
    words[1, :, Field.SCALE] = 7
    assert torch.all(words == 7)


def test_reads_a_row_of_a_larger_output():
    output = torch.full((3, 4, 2, 8), float("nan"))
    z, z_text = torch.randn(4, 8), torch.randn(4, 8)
    output[1, :, 0] = z
    assert torch.equal(selected(output[1, :, 0], z_text), select_heads_reference(z, z_text, 2.0))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        selected(torch.zeros(2, 8), torch.zeros(3, 8))
    with pytest.raises(ValueError, match="stride"):
        selected(torch.zeros(2, 8), torch.zeros(8, 2).t())
