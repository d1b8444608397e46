"""Drawn rows for the tests of `attention_rows`, and what autograd says of them."""

from __future__ import annotations

import torch

from headway.kernels.attention_rows import AttentionRows, RowEdits
from headway.kernels.cache_products import CacheProducts
from headway.kernels.head_word import Field, Tag
from tests.kernels.batches import TAGS


class Rows:
    """Drawn rows whose padding is NaN, or infinite in the values."""

    def __init__(
        self,
        seed: int,
        lengths: list[int],
        num_kv_heads: int = 2,
        group: int = 3,
        head_size: int = 16,
        num_keys: int | None = None,
        num_candidates: int = 5,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        num_heads, num_rows = num_kv_heads * group, len(lengths)
        num_keys = num_keys or max(lengths)
        self.lengths, self.seq_lens = lengths, torch.tensor(lengths)
        self.query = torch.randn(num_rows, num_heads, head_size, generator=draw)
        self.key = torch.randn(num_rows, num_kv_heads, head_size, num_keys, generator=draw)
        self.value = torch.randn(num_rows, num_kv_heads, num_keys, head_size, generator=draw)
        for row, length in enumerate(lengths):
            self.key[row, :, :, length:] = torch.nan
            self.value[row, :, length:] = torch.inf
        chosen = torch.randint(len(TAGS), (num_rows, num_keys), generator=draw)
        self.tags = torch.tensor([int(tag) for tag in TAGS], dtype=torch.uint8)[chosen]
        shape = num_rows, num_candidates, num_heads, head_size
        self.grad_output = torch.randn(shape, generator=draw)

    def attention(self, words: torch.Tensor | None = None, **options) -> AttentionRows:
        edits = None if words is None else RowEdits(words, self.tags[:, : max(self.lengths)])
        return AttentionRows(self.query, self.cache(), edits=edits, **options)

    def cache(self) -> CacheProducts:
        return CacheProducts(*paged(self.key, self.value), self.seq_lens)

    def row(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """query, key, value, tags of one row, [num_heads, ..], the latter [num_keys, heads, ..]."""
        length = self.lengths[index]
        key = self.key[index, :, :, :length].permute(2, 0, 1)
        value = self.value[index, :, :length].transpose(0, 1)
        return self.query[index], key, value, self.tags[index, :length]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]


def paged(
    key: torch.Tensor, value: torch.Tensor, block_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache that holds them, its blocks out of order, and the block table.

    key: [num_rows, num_kv_heads, head_size, num_keys]; value: [num_rows, num_kv_heads, num_keys,
    head_size]. The layout is that of `segment_attention.py`; what is left over is NaN.
    """
    num_rows, heads, size, num_keys = key.shape
    per_row = -(-num_keys // block_size)
    count = num_rows * per_row
    cache = torch.full((count, heads, 2, size * block_size), torch.nan, dtype=key.dtype)
    blocks = (torch.arange(count) * 7 + 3) % count if count % 7 else torch.arange(count).flip(0)
    blocks = blocks.view(num_rows, per_row)
    for row in range(num_rows):
        for at in range(per_row):
            here = slice(at * block_size, (at + 1) * block_size)
            block = cache[blocks[row, at]]
            length = key[row, :, :, here].shape[-1]
            block[:, 0].view(heads, size, block_size)[:, :, :length] = key[row, :, :, here]
            block[:, 1].view(heads, block_size, size)[:, :length] = value[row, :, here]
    return cache.view(count, heads, block_size, 2 * size), blocks


def formula(
    x: torch.Tensor, word: torch.Tensor, tags: torch.Tensor, first: int
) -> tuple[torch.Tensor, bool]:
    """Weights of one head, differentiable, float64 [num_keys], from logits x after the soft cap.

    The formula of `reference.py` without a window's early keys, which are those before `first`.
    Also: whether the word's condition is so near its edge that rounding may tip it.
    """
    value = {field: float(word[field]) for field in Field}
    distance = len(x) - 1 - torch.arange(len(x))

    def members(require: Field, exclude: Field, window: Field) -> torch.Tensor:
        wanted, unwanted, reach = int(value[require]), int(value[exclude]), value[window]
        tagged = [tag & wanted == wanted and not tag & unwanted for tag in tags.tolist()]
        return torch.tensor(tagged) & (distance.clamp(1, reach) == distance if reach else True)

    in_a = members(Field.REQUIRE_A, Field.EXCLUDE_A, Field.WINDOW_A)
    in_b = members(Field.REQUIRE_B, Field.EXCLUDE_B, Field.WINDOW_B)
    image = (tags & Tag.IMAGE) > 0
    add_a = value[Field.BIAS_A] + value[Field.ABS_GAIN_A] * x.abs()
    add_b = value[Field.BIAS_B] + value[Field.ABS_GAIN_B] * x.abs()
    logits = value[Field.GAMMA] * x + torch.where(in_a, add_a, 0.0) + torch.where(in_b, add_b, 0.0)
    softmax = torch.cat([x.new_zeros(first), logits[first:].softmax(0)])
    mass_a, mass_b, mass_image = softmax[in_a].sum(), softmax[in_b].sum(), softmax[image].sum()
    with torch.no_grad():
        margins = [
            float(mass_image - value[Field.MIN_IMAGE_MASS]),
            float(softmax[image & in_b].sum() - value[Field.MIN_SHARE_B] * mass_image),
            float(softmax[image & ~in_b].sum() - value[Field.MIN_IMAGE_REST]),
        ]
    edge = any(0 < abs(margin) < 1e-6 for margin in margins)
    if min(margins) < 0:
        return softmax, edge
    gain_a, gain_b = 1.0, value[Field.GAIN_B]
    if mass_b > 0:
        gain_a = 1.0 - value[Field.MOVED_SHARE]
        gain_b = gain_b + value[Field.MOVED_SHARE] * mass_a / mass_b
    weights = softmax * torch.where(in_a, gain_a, 1.0) * torch.where(in_b, gain_b, 1.0)
    if value[Field.RENORM] and weights.sum() > 0:
        weights = weights / weights.sum()
    mix = value[Field.IDENTITY_MIX]
    return (1 - mix) * weights + mix * (distance == 0), edge


class Expected:
    """One row by autograd in float64: the same names as in `AttentionRows`, without padding."""

    def __init__(
        self,
        rows: Rows,
        index: int,
        words: torch.Tensor,
        softmax_scale: float,
        soft_cap: float = 0.0,
        sliding_window: int = -1,
    ) -> None:
        query, key, value, tags = rows.row(index)
        leaves = [tensor.double().requires_grad_() for tensor in (query, key, value)]
        query, key, value = leaves
        group = rows.num_heads // key.shape[1]
        first = max(0, len(key) - sliding_window) if sliding_window > 0 else 0
        mixed, edges = [], []
        for head in range(rows.num_heads):
            x = key[:, head // group] @ query[head] * softmax_scale
            if soft_cap > 0:
                x = soft_cap * torch.tanh(x / soft_cap)
            weights, edge = formula(x, words[index, head], tags, first)
            mixed.append(weights)
            edges.append(edge)
        self.on_edge = any(edges)
        self.weights = torch.stack(mixed)
        values = value.repeat_interleave(group, dim=1)
        self.output = torch.einsum("hj,jhd->hd", self.weights, values)
        grads = []
        for grad in rows.grad_output[index].double():
            loss = (grad * self.output).sum()
            wanted = [self.weights, *leaves]
            grads.append(torch.autograd.grad(loss, wanted, retain_graph=True))
        of_weights, of_query, of_key, of_value = map(torch.stack, zip(*grads, strict=True))
        self.saliency = (self.weights * of_weights).abs().sum(dim=1)
        self.vjp = of_query, of_key[:, -1], of_value[:, -1]
