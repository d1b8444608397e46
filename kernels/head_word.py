"""Columns of a head word as the kernels read them, and the tag bits they know.

The server fills the tables; `tests/unit/test_head_words.py` holds these names against those of
`headway.steering`, which a kernel does not import.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Field(IntEnum):
    """Columns of a head word; see `reference.py` for the formula."""

    GAMMA = 0
    BIAS_A = 1
    BIAS_B = 2
    ABS_GAIN_A = 3
    ABS_GAIN_B = 4
    MOVED_SHARE = 5
    GAIN_B = 6
    RENORM = 7
    IDENTITY_MIX = 8
    MIN_IMAGE_MASS = 9
    MIN_SHARE_B = 10
    MIN_IMAGE_REST = 11
    REQUIRE_A = 12
    EXCLUDE_A = 13
    WINDOW_A = 14
    REQUIRE_B = 15
    EXCLUDE_B = 16
    WINDOW_B = 17
    SCALE = 18
    SHIFT_INDEX = 19


class Tag(IntFlag):
    """What a key is; OUTPUT is decided by position and never stored."""

    IMAGE = 1
    SINK = 2
    EMPHASISED = 4
    OUTPUT = 8


class Mass(IntEnum):
    """Columns of the masses that the kernels read out, before any gain."""

    A = 0
    B = 1
    IMAGE = 2
    EDITED = 3  # 1 where the word's condition held, else 0
