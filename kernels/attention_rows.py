"""Attention of single query rows with head words, its vector-Jacobian product and saliencies.

The forward is that of `reference.py` without the affine step; the backward is written by hand, for
several losses at once, because a row's attention is a handful of small products whose cost on a
CPU is that of launching them.

Without edits, with w = softmax(s) and dw_j = dL/dz . v_j, the gradient of a logit is
ds_j = w_j * (dw_j - sum w dw). With a head word (names as in `reference.py`) let, per head,

    c_j = g_A^[j in A] * g_B^[j in B],    S = sum a c where the word renormalises, else 1
    v_j = a_j * c_j / S,    d_j = (1 - u) * v_j
    h_j = [j in B] * p * a_j * g_A^[j in A] / (S * m_B)
    b_j = a_j * ([j in A] - [j in B] * m_A / m_B)

Here h and b carry the change of g_B with the masses: logit j changes m_A / m_B by b_j / m_B. Then

    ds_j = d_j * dw_j - e_j * sum(d dw) + b_j * (1 - u) * sum(h dw)
    e_j  = v_j + b_j * sum(h) if the word renormalises, else a_j

and a raw logit follows by the slope of the edit of logits and of the soft cap. The condition is a
step function of the masses: no gradient goes through it. Where it fails, p = u = 0 and c = S = 1.

Saliency: `saliency_row.py` has the formula and its source; here A is w, the weights really applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headway.kernels.cache_products import CacheProducts
from headway.kernels.head_word import Field, Tag

# Of the columns up to MIN_IMAGE_REST: what leaves a head's weights alone.
_IDENTITY = [1.0 if column in (Field.GAMMA, Field.GAIN_B) else 0.0 for column in range(12)]


@dataclass(frozen=True)
class RowEdits:
    """Head words of a layer's rows; SCALE and SHIFT_INDEX are ignored.

    words: float32 [num_rows, num_heads, len(Field)], identity words for rows that are not edited.
    tags: uint8 [num_rows, num_keys], bits of `Tag`, OUTPUT included; arbitrary at padding.
    """

    words: Tensor
    tags: Tensor


class AttentionRows:
    """One query row of each of several sequences, over all of that sequence's keys.

    query: [num_rows, num_heads, head_size], any float dtype; all is computed in float32. cache:
    products with the keys and values of row r, cache.lengths[r] of them: the row is the query at
    the last one's position. Those that a sliding window leaves out must be finite. soft_cap,
    sliding_window: none if <= 0. edits: None where no row has its weights edited.

    weights: float32 [num_rows, num_heads, cache.num_keys], those really applied, 0 at padding.
    """

    def __init__(
        self,
        query: Tensor,
        cache: CacheProducts,
        softmax_scale: float,
        soft_cap: float = 0.0,
        sliding_window: int = -1,
        edits: RowEdits | None = None,
    ) -> None:
        num_keys, seq_lens = cache.num_keys, cache.lengths
        self._cache = cache
        windowed = 0 < sliding_window < num_keys
        padded = windowed or cache.is_ragged
        distance = hidden = self._last = None
        if padded or edits is not None:
            distance = (seq_lens - 1)[:, None] - torch.arange(num_keys)
        if padded and distance is not None:
            hidden = distance < 0
            if windowed:
                hidden |= distance >= sliding_window
            self._last = torch.arange(len(query)), seq_lens - 1

        self._factor = softmax_scale / soft_cap if soft_cap > 0 else softmax_scale
        self._query = query.float() * self._factor
        logits = cache.with_keys(self._query[:, :, None])[:, :, 0]
        slope = None
        if soft_cap > 0:
            tanh = torch.tanh(logits)
            logits, slope = soft_cap * tanh, soft_cap * (1.0 - tanh * tanh)
        if edits is None or distance is None:
            if hidden is not None:
                logits.masked_fill_(hidden[:, None], -torch.inf)
            weights = torch.softmax(logits, dim=-1)
            self._mixing = _Mixing(weights, direct=weights, common=weights, slope=slope)
        else:
            self._mixing = _edited(logits, edits, distance, hidden, slope)
        self.weights = self._mixing.weights
        self._products: _Products | None = None

    @cached_property
    def output(self) -> Tensor:
        """float32 [num_rows, num_heads, head_size], sum_j w_j v_j, before any affine step."""
        return self._cache.mix_values(self.weights[:, :, None])[:, :, 0]

    def saliency(self, grad_output: Tensor) -> Tensor:
        """sum over heads of |w * dL/dw|, float32 [num_rows, num_candidates, num_keys].

        grad_output: [num_rows, num_candidates, num_heads, head_size], dL/d(output) for the loss of
        each candidate; not to be written to as long as this object is asked about it.
        """
        return torch.linalg.vector_norm(self._against(grad_output).weighted, ord=1, dim=1)

    def vjp(self, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for the query and for the key and value at the query's own position.

        grad_output as in `saliency`. Older keys and values do not depend on the row's hidden state
        and count as constants. Returns grad_query, [num_rows, num_candidates, num_heads,
        head_size], and grad_key, grad_value, [num_rows, num_candidates, num_kv_heads, head_size];
        all float32.
        """
        products = self._against(grad_output)
        grad_logits = self._mixing.backward(products)
        grad_query = self._cache.mix_keys(grad_logits).mul_(self._factor)

        # [num_rows, num_kv_heads, group, ..]: the heads of a group share their key and value.
        by_group = self._cache.num_kv_heads, self._query.shape[1] // self._cache.num_kv_heads
        own_logit = self._own(grad_logits).unflatten(1, by_group)
        grad_key = own_logit.transpose(2, 3) @ self._query.unflatten(1, by_group)
        own_weight = self._own(self.weights).unflatten(1, by_group)[..., None, None]
        grad_value = (own_weight * products.grad_rows.unflatten(1, by_group)).sum(2)
        return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2)

    def _against(self, grad_output: Tensor) -> _Products:
        """The products of grad_output with the values, kept for the next call with the same one."""
        if self._products is None or self._products.grad_output is not grad_output:
            grad_rows = grad_output.float().transpose(1, 2)
            grad_weights = self._cache.with_values(grad_rows)
            weighted = grad_weights * self.weights[:, :, None]
            self._products = _Products(grad_output, grad_rows, grad_weights, weighted)
        return self._products

    def _own(self, rows: Tensor) -> Tensor:
        """[num_rows, ..., num_keys] at each row's own key: [num_rows, ...]."""
        if self._last is None:
            return rows[..., -1]
        row, last = self._last
        return rows[row, ..., last]


@dataclass(frozen=True)
class _Products:
    """What both the saliencies and the gradients of one grad_output begin with."""

    grad_output: Tensor
    grad_rows: Tensor  # [num_rows, num_heads, num_candidates, head_size]
    grad_weights: Tensor  # dL/dw, [num_rows, num_heads, num_candidates, num_keys]
    weighted: Tensor  # w * dL/dw, likewise


@dataclass(frozen=True)
class _Mixing:
    """Weights, and their Jacobian as the head of this file writes it: [rows, heads, keys] each."""

    weights: Tensor
    direct: Tensor  # d
    common: Tensor  # e
    moved: tuple[Tensor, Tensor] | None = None  # (1 - u) * h and b; None if no mass is moved
    slope: Tensor | None = None  # of the logits by the raw ones, None if it is 1

    def backward(self, products: _Products) -> Tensor:
        """The gradients of the raw logits, [rows, heads, candidates, keys]."""
        direct = products.weighted
        if self.direct is not self.weights:
            direct = products.grad_weights * self.direct[:, :, None]
        total = direct.sum(dim=-1, keepdim=True)
        grad = torch.addcmul(direct, total, self.common[:, :, None], value=-1.0)
        if self.moved is not None:
            source, change = self.moved
            grad.addcmul_(products.grad_weights @ source[..., None], change[:, :, None])
        return grad if self.slope is None else grad.mul_(self.slope[:, :, None])


def _edited(
    x: Tensor, edits: RowEdits, distance: Tensor, hidden: Tensor | None, slope: Tensor | None
) -> _Mixing:
    """The weights of soft-capped logits x, [rows, heads, keys], under the rows' head words.

    distance: int64 [rows, keys], from the key to the query. hidden: bool, likewise, None if no key
    is. slope: of x by the raw logits, None if it is 1.
    """
    words = edits.words
    in_class = _members(words, edits.tags, distance)
    in_a, in_b = in_class.unbind(dim=2)
    in_class = in_class.float()
    identity = words.new_tensor(_IDENTITY)
    # One look at all the words, so that what no word asks for is not computed.
    changed = (words[..., : len(_IDENTITY)] != identity).flatten(0, 1).any(dim=0).tolist()

    logits = x
    if any(changed[: Field.ABS_GAIN_B + 1]):
        # Rows: the biases of A and B, then their gains of |x|.
        additions = words[..., Field.BIAS_A : Field.ABS_GAIN_B + 1].unflatten(-1, (2, 2)) @ in_class
        add, abs_gain = additions.unbind(dim=2)
        gamma = words[..., Field.GAMMA, None]
        logits = gamma * x + add + abs_gain * x.abs()
        edit_slope = gamma + abs_gain * x.sign()
        slope = edit_slope if slope is None else slope * edit_slope
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None], -torch.inf)
    softmax = torch.softmax(logits, dim=-1)
    if not any(changed[Field.MOVED_SHARE :]):
        return _Mixing(softmax, direct=softmax, common=softmax, slope=slope)

    met = torch.ones_like(words[..., :1], dtype=torch.bool)
    if any(changed[Field.MIN_IMAGE_MASS :]):
        met = _condition(words, softmax, in_b, edits.tags)
    weights, moved = softmax, None
    if changed[Field.MOVED_SHARE] or changed[Field.GAIN_B]:
        mass_a, mass_b = (in_class @ softmax[..., None]).unbind(dim=2)
        share = torch.where(met & (mass_b > 0), words[..., Field.MOVED_SHARE, None], 0.0)
        # Where nothing moves, m_A / m_B is not needed and must not overflow.
        mass_b = torch.where(share != 0, mass_b, 1.0)
        ratio = mass_a / mass_b
        gain_b = torch.where(met, words[..., Field.GAIN_B, None], 1.0) + share * ratio
        kept = softmax * (1.0 - share * in_a)
        weights = torch.where(in_b, kept * gain_b, kept)
        if changed[Field.MOVED_SHARE]:
            source = torch.where(in_b, kept * (share / mass_b), 0.0)
            moved = source, softmax * (in_a.float() - ratio * in_b)
    common = softmax
    if changed[Field.RENORM]:
        total = weights.sum(dim=-1, keepdim=True)
        renorm = met & (words[..., Field.RENORM, None] != 0) & (total > 0)
        total = torch.where(renorm, total, 1.0)
        weights = weights / total
        by_weights = weights
        if moved is not None:
            source, change = moved[0] / total, moved[1]
            by_weights = weights + source.sum(dim=-1, keepdim=True) * change
            moved = source, change
        common = torch.where(renorm, by_weights, softmax)
    direct = weights
    if changed[Field.IDENTITY_MIX]:
        mix = torch.where(met, words[..., Field.IDENTITY_MIX, None], 0.0)
        direct = (1.0 - mix) * weights
        weights = direct + mix * (distance == 0)[:, None]
        if moved is not None:
            moved = (1.0 - mix) * moved[0], moved[1]
    return _Mixing(weights, direct, common, moved, slope)


def _members(words: Tensor, tags: Tensor, distance: Tensor) -> Tensor:
    """bool [rows, heads, 2, keys]: which keys are in the classes A and B of each word."""
    columns = words[..., Field.REQUIRE_A : Field.WINDOW_B + 1].int().unflatten(-1, (2, 3))
    require, exclude, reach = columns[..., None].unbind(dim=3)
    tags, distance = tags[:, None, None].int(), distance[:, None, None]
    near = (reach == 0) | ((distance >= 1) & (distance <= reach))
    return ((tags & require) == require) & ((tags & exclude) == 0) & near


def _condition(words: Tensor, softmax: Tensor, in_b: Tensor, tags: Tensor) -> Tensor:
    """bool [rows, heads, 1]: whether the masses meet what the word asks for."""
    image = ((tags & int(Tag.IMAGE)) != 0)[:, None]
    # The rest has a sum of its own: a difference of sums would be rounding where it should be 0.
    parts = torch.stack([image & in_b, image & ~in_b], dim=2).float()
    image_b, rest = (parts @ softmax[..., None]).unbind(dim=2)
    mass = image_b + rest
    met = mass >= words[..., Field.MIN_IMAGE_MASS, None]
    met &= image_b >= words[..., Field.MIN_SHARE_B, None] * mass
    return met & (rest >= words[..., Field.MIN_IMAGE_REST, None])
