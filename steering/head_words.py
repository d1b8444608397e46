"""The head word: the parameters of the attention edit of one (layer, head).

For query i with logits x_j and key classes A and B, a head word describes

    s_j = gamma * x_j + sum over c of [j in c] * (bias_c + abs_gain_c * |x_j|)
    a_j = softmax_j(s_j)
    w_j = a_j * g_A^[j in A] * g_B^[j in B],   g_A = 1 - p,   g_B = gain_B + p * m_A / m_B
    w_j = w_j / sum w                          (where renorm is set)
    w_j = (1 - u) * w_j + u * [j == i]
    z   = scale * sum_j w_j v_j + shift

with the three lines after the softmax left out where the condition on the masses fails, and the
identity word changes nothing. The table of all words of a request has the shape
[num_layers, num_heads, len(HeadField)], float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

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
    MIN_SHARE_B = 10  # condition: share of class B in the image mass at least this
    MIN_IMAGE_REST = 11  # condition: image mass outside of class B at least this
    REQUIRE_A = 12  # class A: tags a key must have
    EXCLUDE_A = 13  # tags it must not have
    WINDOW_A = 14  # 1 <= query - key <= window; 0: any distance
    REQUIRE_B = 15
    EXCLUDE_B = 16
    WINDOW_B = 17
    SCALE = 18  # factor on the head output, before o_proj
    SHIFT_INDEX = 19  # row of `HeadWords.shifts` added to the head output; -1: none


class KeyTag(IntFlag):
    """What a cached token is; key classes are made of these."""

    IMAGE = 1
    SINK = 2
    EMPHASISED = 4
    OUTPUT = 8


@dataclass(frozen=True)
class KeyClass:
    """Keys that carry all of `require` and none of `exclude`, at most `window` tokens back.

    window: 1 <= query - key <= window, in tokens; 0 means any distance.
    """

    require: KeyTag = KeyTag(0)
    exclude: KeyTag = KeyTag(0)
    window: int = 0


F = HeadField
IDENTITY_WORD = np.zeros(len(HeadField), dtype=np.float32)
IDENTITY_WORD[[F.GAMMA, F.GAIN_B, F.SCALE]] = 1.0
IDENTITY_WORD[F.SHIFT_INDEX] = -1.0

AFFINE = [F.SCALE, F.SHIFT_INDEX]
"""Fields that act on the head output alone and so never need the attention weights."""
ATTENTION = [column for column in HeadField if column not in AFFINE]
CLASS_A, CLASS_B = slice(F.REQUIRE_A, F.WINDOW_A + 1), slice(F.REQUIRE_B, F.WINDOW_B + 1)
CONDITION = slice(F.MIN_IMAGE_MASS, F.MIN_IMAGE_REST + 1)
USES_A = [F.BIAS_A, F.ABS_GAIN_A, F.MOVED_SHARE]
USES_B = [F.BIAS_B, F.ABS_GAIN_B, F.MOVED_SHARE, F.GAIN_B]
"""Fields that mean something only together with the class; where all are neutral it is unused."""
AFTER_SOFTMAX = [F.MOVED_SHARE, F.GAIN_B, F.RENORM]
"""Fields that only one of two composed words may use: their order would matter."""


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
            words.table[layer, head, F.SCALE] = scale
        return words

    @classmethod
    def uniform(
        cls,
        geometry: ModelGeometry,
        heads: Iterable[tuple[int, int]],
        fields: dict[HeadField, float],
        class_a: KeyClass | None = None,
        class_b: KeyClass | None = None,
    ) -> HeadWords:
        """The same attention edit on each given (layer, head); the identity if nothing is edited.

        Classes that no field uses, and conditions with nothing to guard, leave no trace: two
        spellings of one edit are the same words.
        """
        word = IDENTITY_WORD.copy()
        for column, value in fields.items():
            word[column] = value
        guarded = [*AFTER_SOFTMAX, F.IDENTITY_MIX]
        if (word[guarded] == IDENTITY_WORD[guarded]).all():
            word[CONDITION] = IDENTITY_WORD[CONDITION]
        for key_class, columns, users in ((class_a, CLASS_A, USES_A), (class_b, CLASS_B, USES_B)):
            if key_class is not None and (word[users] != IDENTITY_WORD[users]).any():
                word[columns] = [key_class.require, key_class.exclude, key_class.window]
        words = cls.identity(geometry)
        for layer, head in heads:
            words.table[layer, head] = word
        return words

    @property
    def edited(self) -> np.ndarray:
        """bool [num_layers, num_heads]: where the word is not the identity."""
        return (self.table != IDENTITY_WORD).any(axis=-1)

    @property
    def edits_attention(self) -> np.ndarray:
        """bool [num_layers, num_heads]: where the attention weights themselves are edited."""
        return (self.table[..., ATTENTION] != IDENTITY_WORD[ATTENTION]).any(axis=-1)

    @property
    def is_conditional(self) -> np.ndarray:
        """bool [num_layers, num_heads]: where the edit has a condition on the masses."""
        return (self.table[..., CONDITION] != 0).any(axis=-1)

    @property
    def moves_mass(self) -> np.ndarray:
        """bool [num_layers, num_heads]: where mass is moved, gained, renormalised, asked about."""
        columns = [F.MOVED_SHARE, F.GAIN_B, F.RENORM]
        changed = (self.table[..., columns] != IDENTITY_WORD[columns]).any(axis=-1)
        return np.asarray(changed | self.is_conditional)

    @property
    def is_identity(self) -> bool:
        """Whether no word changes anything."""
        return not bool(self.edited.any())

    @property
    def is_affine(self) -> bool:
        """Whether only scales and shifts of head outputs are edited."""
        return not bool(self.edits_attention.any())

    def mentions(self, tag: KeyTag) -> np.ndarray:
        """bool [num_layers, num_heads]: where a key class asks for this tag."""
        columns = [F.REQUIRE_A, F.EXCLUDE_A, F.REQUIRE_B, F.EXCLUDE_B]
        bits: np.ndarray = self.table[..., columns].astype(np.int64) & int(tag)
        return np.asarray((bits != 0).any(axis=-1))

    def conflict(self, later: HeadWords) -> tuple[int, int] | None:
        """The first (layer, head) at which two tables cannot be composed, None if there is none.

        Two words need different classes in the same place, or both act on the weights after the
        softmax, or one's condition would come to guard the other's identity mix.
        """
        ours, theirs = self.table, later.table
        guarded = [F.IDENTITY_MIX, *AFTER_SOFTMAX]
        clashes = [
            _used(ours, AFTER_SOFTMAX) & _used(theirs, AFTER_SOFTMAX),
            self.is_conditional & _used(theirs, guarded),
            later.is_conditional & _used(ours, guarded),
        ]
        for columns, users in ((CLASS_A, USES_A), (CLASS_B, USES_B)):
            different = (ours[..., columns] != theirs[..., columns]).any(axis=-1)
            clashes.append(_used(ours, users) & _used(theirs, users) & different)
        found = np.argwhere(np.any(clashes, axis=0))
        return (int(found[0, 0]), int(found[0, 1])) if len(found) else None

    def silences(self, other: HeadWords) -> tuple[int, int] | None:
        """The first (layer, head) that these words scale by 0 and others shift, None for none."""
        shifted = other.table[..., F.SHIFT_INDEX] >= 0
        found = np.argwhere((self.table[..., F.SCALE] == 0) & shifted)
        return (int(found[0, 0]), int(found[0, 1])) if len(found) else None

    def then(self, later: HeadWords) -> HeadWords:
        """The composition of words without a `conflict`: these and `later`.

        Logit biases and gains add, gammas multiply, and so do scales; then the shifts are added,
        unscaled, whichever came first. So the order of affine edits does not matter, and heads
        that are chosen while a request runs are scaled as if they had been given. Raises
        ValueError for words that conflict.
        """
        if (at := self.conflict(later)) is not None:
            raise ValueError(f"two edits redistribute attention at layer {at[0]}, head {at[1]}")
        ours, theirs = self.table, later.table
        table = ours + theirs - IDENTITY_WORD  # right for sums and for fields that one side uses
        for column in (F.GAMMA, F.SCALE):
            table[..., column] = ours[..., column] * theirs[..., column]
        kept = (1 - ours[..., F.IDENTITY_MIX]) * (1 - theirs[..., F.IDENTITY_MIX])
        table[..., F.IDENTITY_MIX] = 1 - kept
        for columns, users in ((CLASS_A, USES_A), (CLASS_B, USES_B)):
            ours_used = _used(ours, users)[..., None]
            table[..., columns] = np.where(ours_used, ours[..., columns], theirs[..., columns])
        # A shift of zero and no shift are the same edit; the composed rows are made anew.
        shift = self.dense_shift() + later.dense_shift()
        table[..., F.SHIFT_INDEX], shifts = index_shifts(shift)
        return HeadWords(table, shifts)

    def dense_shift(self) -> np.ndarray:
        """float32 [num_layers, num_heads, head_size]: the shift of every head, 0 where none."""
        index = self.table[..., F.SHIFT_INDEX].astype(np.int64)
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


def _used(table: np.ndarray, columns: list[HeadField]) -> np.ndarray:
    used: np.ndarray = (table[..., columns] != IDENTITY_WORD[columns]).any(axis=-1)
    return used
