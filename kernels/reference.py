"""The head word's formula on dense tensors: the oracle of every fast attention kernel.

For query i at position p_i and keys j <= p_i (within the sliding window), with
x_j = soft_cap(softmax_scale * q_i . k_j):

    logits     s_j = gamma * x_j + sum over c in {A, B} of [j in c] * (bias_c + abs_gain_c * |x_j|)
    softmax    a_j = exp(s_j) / sum exp(s)
    masses     m_A, m_B, m_image = sums of a over the class
    condition  m_image >= min_image_mass, m_(B and image) >= min_share_B * m_image,
               m_(image and not B) >= min_image_rest; if it fails, w = a in the next three lines
    gains      w_j = a_j * g_A^[j in A] * g_B^[j in B], g_A = 1 - p, g_B = gain_B + p * m_A / m_B;
               with m_B = 0 there is nowhere to move mass to: g_A = 1, g_B = gain_B
    renorm     w_j = w_j / sum w
    identity   w_j = (1 - u) * w_j + u * [j == i]
    values     z = sum_j w_j v_j
    affine     z = scale * z + shift

Key j is in a class if its tags contain all of `require`, none of `exclude`, and, for a window
n > 0, if 1 <= p_i - j <= n. Float32, one query and head at a time: slow, and obvious.
"""

from __future__ import annotations

import torch

from headway.kernels.head_word import Field, Mass, Tag


def segment_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    tags: torch.Tensor,
    words: torch.Tensor,
    softmax_scale: float,
    soft_cap: float = 0.0,
    sliding_window: int = -1,
    shifts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence with a head word per (query, head).

    query: [num_queries, num_heads, head_size]; key, value: [num_keys, num_kv_heads, head_size],
    key j at position j. positions: int [num_queries]. tags: int [num_keys], bits of `Tag`.
    words: float32 [num_queries, num_heads, len(Field)]. soft_cap, sliding_window: none if <= 0.
    shifts: float32 [num_shifts, head_size], what SHIFT_INDEX points at.

    Returns z, float32 [num_queries, num_heads, head_size], and the masses before any gain,
    float32 [num_queries, num_heads, len(Mass)].
    """
    num_queries, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    z = torch.empty(query.shape, dtype=torch.float32)
    masses = torch.empty(num_queries, num_heads, len(Mass))
    for i in range(num_queries):
        position = int(positions[i])
        first = max(0, position - sliding_window + 1) if sliding_window > 0 else 0
        keys = torch.arange(first, position + 1)
        for head in range(num_heads):
            word = words[i, head].float()
            x = key[keys, head // group].float() @ query[i, head].float() * softmax_scale
            if soft_cap > 0:
                x = soft_cap * torch.tanh(x / soft_cap)
            weights, masses[i, head] = _weights(x, word, position - keys, tags[keys])
            out = word[Field.SCALE] * (weights @ value[keys, head // group].float())
            if shifts is not None and word[Field.SHIFT_INDEX] >= 0:
                out = out + shifts[int(word[Field.SHIFT_INDEX])]
            z[i, head] = out
    return z, masses


def _weights(
    x: torch.Tensor, word: torch.Tensor, distance: torch.Tensor, tags: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    in_a = _members(word, Field.REQUIRE_A, Field.EXCLUDE_A, Field.WINDOW_A, distance, tags)
    in_b = _members(word, Field.REQUIRE_B, Field.EXCLUDE_B, Field.WINDOW_B, distance, tags)
    image = (tags & Tag.IMAGE) != 0
    logits = word[Field.GAMMA] * x
    logits = logits + in_a * (word[Field.BIAS_A] + word[Field.ABS_GAIN_A] * x.abs())
    logits = logits + in_b * (word[Field.BIAS_B] + word[Field.ABS_GAIN_B] * x.abs())
    weights = torch.softmax(logits, dim=0)
    mass_a, mass_b, mass_image = weights[in_a].sum(), weights[in_b].sum(), weights[image].sum()
    met = (
        mass_image >= word[Field.MIN_IMAGE_MASS]
        and weights[image & in_b].sum() >= word[Field.MIN_SHARE_B] * mass_image
        and weights[image & ~in_b].sum() >= word[Field.MIN_IMAGE_REST]
    )
    masses = torch.stack([mass_a, mass_b, mass_image, torch.tensor(float(met))])
    if not met:
        return weights, masses
    moved = word[Field.MOVED_SHARE] if mass_b > 0 else torch.tensor(0.0)
    gain_b = word[Field.GAIN_B] + (moved * mass_a / mass_b if mass_b > 0 else 0.0)
    weights = weights * torch.where(in_a, 1 - moved, 1.0) * torch.where(in_b, gain_b, 1.0)
    if word[Field.RENORM] and weights.sum() > 0:
        weights = weights / weights.sum()
    mix = word[Field.IDENTITY_MIX]
    return (1 - mix) * weights + mix * (distance == 0), masses


def _members(
    word: torch.Tensor,
    require: Field,
    exclude: Field,
    window: Field,
    distance: torch.Tensor,
    tags: torch.Tensor,
) -> torch.Tensor:
    """bool [num_keys]: which keys are in the class of these three columns."""
    wanted, unwanted, reach = (int(word[column]) for column in (require, exclude, window))
    members = ((tags & wanted) == wanted) & ((tags & unwanted) == 0)
    return members & (distance >= 1) & (distance <= reach) if reach else members
