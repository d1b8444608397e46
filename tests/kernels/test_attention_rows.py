"""Attention rows against the head word's formula, and their gradients against autograd."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headway.kernels.attention_rows import AttentionRows, RowEdits
from headway.kernels.cache_products import CacheProducts
from headway.kernels.head_word import Field, Tag
from headway.kernels.reference import segment_attention_reference
from headway.kernels.saliency_row import saliency_row_reference
from tests.kernels.batches import draw_words, identity_words, var_words
from tests.kernels.rows import Expected, Rows, paged

pytestmark = pytest.mark.unit


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    """To `tolerance` of the largest number in `want`: sums of either sign cancel."""
    assert got.dtype == torch.float32
    limit = tolerance * max(1.0, float(want.detach().abs().max()))
    torch.testing.assert_close(got.double(), want.detach().double(), atol=limit, rtol=0.0)


def check(rows: Rows, words: torch.Tensor | None, **options) -> int:
    """Compare every row with autograd; the number of rows that were not on a condition's edge."""
    attention = rows.attention(words, **options)
    saliency = attention.saliency(rows.grad_output)
    gradients = attention.vjp(rows.grad_output)
    formula_words = identity_words(len(rows.lengths), rows.num_heads) if words is None else words
    checked = 0
    for index, length in enumerate(rows.lengths):
        want = Expected(rows, index, formula_words, **options)
        if want.on_edge:
            continue
        checked += 1
        assert_close(attention.weights[index, :, :length], want.weights)
        assert_close(attention.output[index], want.output)
        assert_close(saliency[index, :, :length], want.saliency)
        for got, expected in zip(gradients, want.vjp, strict=True):
            assert_close(got[index], expected)
        assert (attention.weights[index, :, length:] == 0).all()
        assert (saliency[index, :, length:] == 0).all()
    return checked


ROWS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "lengths": st.lists(st.integers(1, 24), min_size=1, max_size=3),
        "num_kv_heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 3, 4]),
        "num_keys": st.sampled_from([None, 24, 30]),
        "num_candidates": st.sampled_from([1, 5]),
    }
)
OPTIONS = st.fixed_dictionaries(
    {
        "softmax_scale": st.sampled_from([0.25, 0.6]),
        "soft_cap": st.sampled_from([0.0, 0.0, 1.5]),
        "sliding_window": st.sampled_from([-1, -1, 1, 9, 100]),
    }
)


@settings(max_examples=40, deadline=None)
@given(ROWS, OPTIONS)
def test_drawn_words_equal_autograd(drawn, options):
    rows = Rows(**drawn)
    check(rows, draw_words(drawn["seed"], len(rows.lengths), rows.num_heads), **options)


@settings(max_examples=20, deadline=None)
@given(ROWS, OPTIONS)
def test_rows_without_edits_equal_autograd(drawn, options):
    rows = Rows(**drawn)
    assert check(rows, None, **options) == len(rows.lengths)


def one_edit(**fields: float) -> torch.Tensor:
    words = identity_words(3, 6)
    words[..., Field.REQUIRE_A] = float(Tag.IMAGE)
    words[..., Field.REQUIRE_B] = float(Tag.SINK)  # one of the tags is IMAGE | SINK: they overlap
    for name, value in fields.items():
        words[..., Field[name]] = value
    return words


EDITS = {
    "identity": identity_words(3, 6),
    "var": var_words(3, 6),
    "var_all": var_words(3, 6, p=1.0),
    "var_on_condition": var_words(3, 6) + one_edit(MIN_IMAGE_MASS=0.2) - one_edit(),
    "locore": one_edit(BIAS_B=math.log(1.15), REQUIRE_B=float(Tag.OUTPUT), WINDOW_B=8.0),
    "locore_gain": one_edit(GAIN_B=1.2, REQUIRE_B=float(Tag.OUTPUT), WINDOW_B=8.0),
    "overlapping_classes": one_edit(MOVED_SHARE=0.6, RENORM=1.0, GAIN_B=0.5),
    "abs_gain": one_edit(ABS_GAIN_A=0.3, ABS_GAIN_B=-0.2),
    "gamma": one_edit(GAMMA=0.5),
    "removed": one_edit(BIAS_A=-1e30),
    "identity_mix": one_edit(IDENTITY_MIX=0.5),
    "identity_only": one_edit(IDENTITY_MIX=1.0),
    "everything": one_edit(
        GAMMA=1.5, BIAS_A=0.2, ABS_GAIN_B=0.4, MOVED_SHARE=0.25, RENORM=1.0, IDENTITY_MIX=0.3
    ),
}


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("name", EDITS)
def test_one_kind_of_edit_equals_autograd(name, soft_cap):
    rows = Rows(11, [30, 17, 24])
    assert check(rows, EDITS[name], softmax_scale=0.3, soft_cap=soft_cap) == 3


def test_no_mass_to_move_to_is_no_move():
    rows = Rows(12, [30, 17, 24])
    rows.tags &= ~int(Tag.IMAGE) & 0xFF
    words = var_words(3, 6)
    plain = rows.attention(softmax_scale=0.3)
    assert check(rows, words, softmax_scale=0.3) == 3
    assert_close(rows.attention(words, softmax_scale=0.3).weights, plain.weights)


@settings(max_examples=30, deadline=None)
@given(ROWS, OPTIONS)
def test_the_forward_equals_the_reference(drawn, options):
    """Also with keys as values, one-hot, so that the reference's output is its weights."""
    rows = Rows(**(drawn | {"head_size": 32}))
    words = draw_words(drawn["seed"] + 1, len(rows.lengths), rows.num_heads)
    one_hot = torch.eye(rows.key.shape[3], 32).expand(rows.value.shape)
    attention = rows.attention(words, **options)
    for index, length in enumerate(rows.lengths):
        query, key, value, tags = rows.row(index)
        if Expected(rows, index, words, **options).on_edge:
            continue
        position = torch.tensor([length - 1])
        for values, got in (
            (value, attention.output[index]),
            (one_hot[index, :, :length].transpose(0, 1), attention.weights[index]),
        ):
            want, _ = segment_attention_reference(
                query[None], key, values, position, tags.int(), words[index][None], **options
            )
            assert_close(got, want[0, :, : got.shape[1]], 1e-5)
            assert not want[0, :, got.shape[1] :].any()


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("num_candidates", [1, 5])
def test_saliency_equals_the_reference_of_the_plain_kernel(group, num_candidates):
    rows = Rows(13, [40, 9, 1], group=group, num_candidates=num_candidates)
    saliency = rows.attention(softmax_scale=0.3).saliency(rows.grad_output)
    for index, length in enumerate(rows.lengths):
        query, key, value, _ = rows.row(index)
        want = saliency_row_reference(query, key, value, rows.grad_output[index], 0.3)
        assert_close(saliency[index, :, :length], want, 1e-6)


def test_a_row_does_not_depend_on_the_others_or_on_the_width_of_its_padding():
    rows = Rows(14, [40, 9, 23], num_keys=64)
    words = draw_words(14, 3, rows.num_heads)
    together = rows.attention(words, softmax_scale=0.3)
    for index, length in enumerate(rows.lengths):
        key = rows.key[index, None, :, :, :length]
        cache = paged(key, rows.value[index, None, :, :length], block_size=32)
        alone = AttentionRows(
            rows.query[index, None],
            CacheProducts(*cache, rows.seq_lens[index, None]),
            softmax_scale=0.3,
            edits=RowEdits(words[index, None], rows.tags[index, None, :length]),
        )
        grad = rows.grad_output[index, None]
        assert_close(together.output[index], alone.output[0], 1e-6)
        saliency = together.saliency(rows.grad_output)
        assert_close(saliency[index, :, :length], alone.saliency(grad)[0], 1e-6)
        for got, want in zip(together.vjp(rows.grad_output), alone.vjp(grad), strict=True):
            assert_close(got[index], want[0], 1e-6)


def test_another_cotangent_is_not_mistaken_for_the_last_one():
    rows = Rows(15, [20, 11])
    attention = rows.attention(softmax_scale=0.3)
    saliency, gradients = attention.saliency(rows.grad_output), attention.vjp(rows.grad_output)
    doubled = 2 * rows.grad_output
    for got, want in zip(attention.vjp(doubled), gradients, strict=True):
        assert_close(got, 2 * want)
    assert_close(attention.saliency(doubled), 2 * saliency)
    assert_close(attention.saliency(rows.grad_output), saliency)


def test_the_edits_matter():
    """Each edit above gives gradients of its own, so that the tests can fail."""
    rows = Rows(11, [30, 17, 24])
    plain, *_ = rows.attention(softmax_scale=0.3).vjp(rows.grad_output)
    for name, words in EDITS.items():
        edited, *_ = rows.attention(words, softmax_scale=0.3).vjp(rows.grad_output)
        changed = float((edited - plain).abs().max() / plain.abs().max())
        assert (changed < 1e-6) == (name == "identity"), (name, changed)


def test_bfloat16_is_computed_in_float32():
    rows = Rows(16, [20, 11])
    for name in ("query", "key", "value", "grad_output"):
        setattr(rows, name, getattr(rows, name).bfloat16())
    assert check(rows, None, softmax_scale=0.3) == 2


@pytest.mark.parametrize("lengths", [[0, 3], [3, 17]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    rows = Rows(17, [3, 8])
    rows.seq_lens = torch.tensor(lengths)
    with pytest.raises(ValueError, match="lengths must be in 1 .. 16"):
        rows.attention(softmax_scale=0.3)


class Operations(TorchDispatchMode):
    """Counts what is computed or copied, not views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.names[str(func)] += 1
        return result


def test_a_plain_row_takes_few_operations():
    rows = Rows(19, [40])
    cache = rows.cache()
    with Operations() as forward:
        attention = AttentionRows(rows.query, cache, 0.3)
    with Operations() as backward:
        attention.saliency(rows.grad_output)
        attention.vjp(rows.grad_output)
    assert forward.names.total() <= 5, forward.names
    assert backward.names.total() <= 11, backward.names
