"""The gradient of a linear layer against torch in float64, and the invariants of its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import linear_grad as module
from headway.kernels.linear_grad import LinearGradError, linear_grad
from tests.kernels.threads import threads

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd sizes, and around the 4 rows, the 16 columns and the 48 rows of grad that go together.
ROWS = st.sampled_from([1, 2, 3, 5, 8, 17, 40, 47, 48, 49, 100])
OUT_FEATURES = st.sampled_from([1, 3, 4, 5, 17, 64, 255, 577, 1030, 2049])
IN_FEATURES = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 128, 131, 576])
SEEDS = st.integers(0, 10**6)


def draw(seed: int, rows: int, out: int, width: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(rows, out, generator=generator)
    return grad, torch.randn(out, width, generator=generator).to(dtype)


def assert_product(result: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> None:
    """The widened weights are exact, so that all that is lost is lost in float32 sums."""
    assert result.dtype is torch.float32 and result.is_contiguous()
    grad, weight = grad.double(), weight.double()
    tolerance = 1e-6 * (grad.abs() @ weight.abs())
    assert ((result - grad @ weight).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, rows=ROWS, out=OUT_FEATURES, width=IN_FEATURES)
def test_equals_the_product(dtype, seed, rows, out, width):
    grad, weight = draw(seed, rows, out, width, dtype)
    assert_product(linear_grad(grad, weight), grad, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rows=ROWS, out=OUT_FEATURES, width=IN_FEATURES, data=st.data())
def test_a_row_has_the_same_bits_in_any_company(dtype, seed, rows, out, width, data):
    grad, weight = draw(seed, rows, out, width, dtype)
    together = linear_grad(grad, weight)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    assert torch.equal(linear_grad(grad[chosen], weight), together[chosen])
    assert torch.equal(linear_grad(grad[-1:], weight), together[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_number_of_threads_changes_no_bit(rows, dtype):
    grad, weight = draw(rows, rows, 3072, 576, dtype)
    with threads(1):
        alone = linear_grad(grad, weight)
    with threads(2):
        assert torch.equal(linear_grad(grad, weight), alone)


@pytest.mark.parametrize("shape", [(20000, 48), (64, 6200), (18000, 24)])
def test_long_and_wide_weights(shape):
    grad, weight = draw(0, 3, *shape, torch.bfloat16)
    assert_product(linear_grad(grad, weight), grad, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_or_written_outside(dtype):
    wide_grad, wide_weight = draw(1, 4, 37, 60, dtype)
    wide_grad[:, 30:] = torch.nan
    wide_weight[:, 41:] = torch.nan
    wide_weight[30:] = torch.nan
    grad, weight = wide_grad[1:3, :30], wide_weight[:30, :41]
    assert_product(linear_grad(grad, weight), grad, weight)
    assert torch.equal(linear_grad(grad.T.contiguous().T, weight), linear_grad(grad, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_weight_and_infinity_is_widened_exactly(dtype):
    if dtype is torch.float32:
        values = torch.tensor([1e-40, -0.0, 3e38, torch.inf])
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[~values.isnan()]
    with threads(1):
        result = linear_grad(torch.ones(1, 1), values[None])[0]
    assert torch.equal(result, values.float())


def test_a_nan_stays_in_its_column():
    grad, weight = draw(2, 2, 50, 20, torch.bfloat16)
    weight[7, 3] = torch.nan
    result = linear_grad(grad, weight)
    assert result[:, 3].isnan().all() and result.isnan().sum() == 2


@pytest.mark.parametrize("shape", [(0, 5, 6), (3, 0, 6), (3, 5, 0)])
def test_empty_products(shape):
    rows, out, width = shape
    result = linear_grad(torch.ones(rows, out), torch.ones(out, width, dtype=torch.bfloat16))
    assert torch.equal(result, torch.zeros(rows, width))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_kernel_torch_multiplies_in_parts(dtype, monkeypatch):
    monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setattr(module, "FALLBACK_BYTES", 4 * 20 * 13)
    grad, weight = draw(3, 6, 50, 20, dtype)
    assert_product(linear_grad(grad, weight), grad, weight)


@pytest.mark.parametrize(
    "grad, weight, message",
    [
        (torch.ones(2, 4).double(), torch.ones(4, 3), "must be float32"),
        (torch.ones(2, 4), torch.ones(4, 3, dtype=torch.int8), "got torch.float32 and torch.int8"),
        (torch.ones(2, 4), torch.ones(5, 3), r"\[2, 4\] and \[5, 3\]"),
        (torch.ones(4), torch.ones(4, 3), "every row of the weight"),
        (torch.ones(2, 4), torch.ones(3, 4).T, "adjacent"),
        (torch.ones(2, 4), torch.ones(4, 3, device="meta"), "one device"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(grad, weight, message):
    with pytest.raises(LinearGradError, match=message):
        linear_grad(grad, weight)
