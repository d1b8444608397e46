"""Head words: the kernels' columns are steering's, and composition is what the formula says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels import head_word
from headway.kernels.reference import segment_attention_reference
from headway.server.engine.readings import CLASSES
from headway.steering import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords, KeyClass, KeyTag

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(1, 1, 1, 4, 4)
F = HeadField


def test_kernels_and_steering_mean_the_same_columns_and_tags():
    """Neither imports the other."""
    assert {field.name: field.value for field in head_word.Field} == {
        field.name: field.value for field in HeadField
    }
    assert {tag.name: tag.value for tag in head_word.Tag} == {tag.name: tag.value for tag in KeyTag}
    assert [mass.value for mass in CLASSES] == [0, 1, 2]


def words(fields: dict[HeadField, float], **classes: KeyClass) -> HeadWords:
    return HeadWords.uniform(GEOMETRY, [(0, 0)], fields, **classes)


def attend(table: HeadWords) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 12, 1, 4, generator=draw)
    query = torch.randn(12, 1, 4, generator=draw)
    tags = torch.tensor([0, 1, 1, 4, 4, 0, 2, 3, 8, 8, 8, 8])
    rows = torch.from_numpy(table.table[0]).expand(12, -1, -1)
    positions = torch.arange(12)
    z, _ = segment_attention_reference(query, key, value, positions, tags, rows, 0.5)
    return z


BIAS = words({F.BIAS_A: -1.0}, class_a=KeyClass(exclude=KeyTag.EMPHASISED | KeyTag.OUTPUT))
NEAR = words({F.BIAS_B: 0.7}, class_b=KeyClass(require=KeyTag.OUTPUT, window=2))
MOVE = words(
    {F.MOVED_SHARE: 0.6},
    class_a=KeyClass(require=KeyTag.SINK),
    class_b=KeyClass(require=KeyTag.IMAGE, exclude=KeyTag.SINK),
)


def test_an_unused_class_leaves_no_trace():
    assert words({F.BIAS_A: 0.0}, class_a=KeyClass(KeyTag.SINK)).is_identity
    assert words({F.MIN_IMAGE_MASS: 0.2, F.MIN_SHARE_B: 0.5}).is_identity


def test_conditions_guard_only_what_acts_after_the_softmax():
    """A bias under a condition would not be under it: such a word keeps no condition."""
    word = words({F.BIAS_A: 1.0, F.MIN_IMAGE_MASS: 0.9}, class_a=KeyClass(KeyTag.IMAGE))
    assert not word.is_conditional.any()


def test_composition_is_symmetric_and_both_edits_act():
    both = BIAS.then(NEAR)
    np.testing.assert_array_equal(both.table, NEAR.then(BIAS).table)
    results = [attend(each) for each in (HeadWords.identity(GEOMETRY), BIAS, NEAR, both)]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("word", [BIAS, NEAR, MOVE])
def test_the_identity_is_neutral(word):
    identity = HeadWords.identity(GEOMETRY)
    np.testing.assert_array_equal(word.then(identity).table, word.table)
    np.testing.assert_array_equal(identity.then(word).table, word.table)


@pytest.mark.parametrize(("first", "second"), [(MOVE, BIAS), (MOVE, NEAR), (MOVE, MOVE)])
def test_conflicts_are_not_composed(first, second):
    assert first.conflict(second) == second.conflict(first) == (0, 0)
    with pytest.raises(ValueError, match="layer 0, head 0"):
        first.then(second)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_identity_mixes_compose_to_one(one, other):
    first, second = words({F.IDENTITY_MIX: one}), words({F.IDENTITY_MIX: other})
    mixed = first.then(second).table[0, 0, F.IDENTITY_MIX]
    assert mixed == pytest.approx(1 - (1 - one) * (1 - other), abs=1e-6)
