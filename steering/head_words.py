"""The head word: the parameters of the attention edit of one (layer, head).

For query i with logits x_j and key classes A and B, a head word describes

    s_j = gamma * x_j + bias_c(j) + abs_gain_c(j) * |x_j|
    a_j = softmax_j(s_j)
    w_j = a_j * g_c(j),    g_A = 1 - p,    g_B = gain_B + p * m_A / m_B
    w_j = w_j / sum w                      (where renorm is set)
    w_j = (1 - u) * w_j + u * [j == i]
    z   = scale * sum_j w_j v_j + shift

and the identity word changes nothing. The table of all words of a request has the shape
[num_layers, num_heads, len(HeadField)], float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from headway.steering.geometry import ModelGeometry


class HeadField(IntEnum):
    """Columns of a head word."""

    GAMMA = 0  # factor on the logits
    BIAS_A = 1  # added to the logits of class A
    BIAS_B = 2  # added to the logits of class B
    ABS_GAIN_A = 3  # factor on |x| added to the logits of class A
    ABS_GAIN_B = 4  # factor on |x| added to the logits of class B
    MOVED_SHARE = 5  # p: share of the mass of class A given to class B
    GAIN_B = 6  # factor on the weights of class B
    RENORM = 7  # 1: weights are divided by their sum
    IDENTITY_MIX = 8  # u: share of the row replaced by attention to itself
    MIN_IMAGE_MASS = 9  # condition: image mass at least this, else the row is not edited
    MIN_SHARE_B = 10  # condition: m_B / m_image at least this
    SCALE = 11  # factor on the head output, before o_proj
    SHIFT_INDEX = 12  # row of `HeadWords.shifts` added to the head output; -1: none


IDENTITY_WORD = np.zeros(len(HeadField), dtype=np.float32)
IDENTITY_WORD[[HeadField.GAMMA, HeadField.GAIN_B, HeadField.SCALE]] = 1.0
IDENTITY_WORD[HeadField.SHIFT_INDEX] = -1.0

AFFINE_FIELDS = (HeadField.SCALE, HeadField.SHIFT_INDEX)
"""Fields that act on the head output alone and so never need the attention weights."""


@dataclass(frozen=True, eq=False)
class HeadWords:
    """All head words of one program over one query scope.

    table: float32 [num_layers, num_heads, len(HeadField)].
    shifts: float32 [num_shifts, head_size], the vectors that SHIFT_INDEX points at.
    """

    table: np.ndarray
    shifts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @classmethod
    def identity(cls, geometry: ModelGeometry) -> HeadWords:
        """Words that change nothing."""
        table = np.tile(IDENTITY_WORD, (geometry.num_layers, geometry.num_heads, 1))
        return cls(table, np.zeros((0, geometry.head_size), np.float32))

    @classmethod
    def scaled(cls, geometry: ModelGeometry, scales: Iterable[tuple[int, int, float]]) -> HeadWords:
        """Words that multiply the output of each given (layer, head) by its scale."""
        words = cls.identity(geometry)
        for layer, head, scale in scales:
            words.table[layer, head, HeadField.SCALE] = scale
        return words

    @property
    def edited(self) -> np.ndarray:
        """bool [num_layers, num_heads]: where the word is not the identity."""
        return (self.table != IDENTITY_WORD).any(axis=-1)

    @property
    def is_identity(self) -> bool:
        """Whether no word changes anything."""
        return not bool(self.edited.any())

    @property
    def is_affine(self) -> bool:
        """Whether only scales and shifts of head outputs are edited."""
        attention = [column for column in HeadField if column not in AFFINE_FIELDS]
        return bool((self.table[..., attention] == IDENTITY_WORD[attention]).all())

    def then(self, later: HeadWords) -> HeadWords:
        """The composition of affine words: first these, then `later`.

        z -> later.scale * (scale * z + shift) + later.shift. Raises ValueError if either side
        edits the attention weights themselves.
        """
        if not (self.is_affine and later.is_affine):
            raise ValueError("only affine head words compose by multiplication")
        table = self.table.copy()
        table[..., HeadField.SCALE] *= later.table[..., HeadField.SCALE]
        # A shift of zero and no shift are the same edit; the composed rows are made anew.
        shift = later.table[..., HeadField.SCALE, None] * self.dense_shift() + later.dense_shift()
        table[..., HeadField.SHIFT_INDEX], shifts = index_shifts(shift)
        return HeadWords(table, shifts)

    def dense_shift(self) -> np.ndarray:
        """float32 [num_layers, num_heads, head_size]: the shift of every head, 0 where none."""
        index = self.table[..., HeadField.SHIFT_INDEX].astype(np.int64)
        rows = np.vstack([self.shifts, np.zeros((1, self.shifts.shape[1]), np.float32)])
        return rows[index]  # -1 is the appended row of zeros


def index_shifts(shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split dense shifts into indices and the rows they point at.

    shift: float32 [num_layers, num_heads, head_size]. Returns float32 indices
    [num_layers, num_heads] (-1 for a shift of zero) and the rows, in (layer, head) order.
    """
    used = shift.any(axis=-1)
    index = np.full(shift.shape[:2], -1.0, np.float32)
    index[used] = np.arange(int(used.sum()), dtype=np.float32)
    return index, np.ascontiguousarray(shift[used], dtype=np.float32)
