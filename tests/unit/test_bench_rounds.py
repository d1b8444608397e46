"""Whatever is compared stands together in a round, and nothing is left out or comes twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.benchmarks.rounds import compared_together, shuffled
from headway.benchmarks.serve_matrix import POINTS, cells, comparisons

pytestmark = pytest.mark.unit


def test_pairs_join_groups_and_the_rest_stand_alone() -> None:
    assert compared_together("abcdef", [("a", "c"), ("e", "d"), ("c", "e")]) == [
        ["a", "c", "e", "d"],
        ["b"],
        ["f"],
    ]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12),
    st.randoms(use_true_random=False),
)
def test_a_round_has_every_item_once_and_no_stranger_between_two_of_a_group(
    pairs: list[tuple[int, int]], order: random.Random
) -> None:
    groups = compared_together(range(10), pairs)
    for one, other in pairs:
        assert any(one in group and other in group for group in groups)
    found = shuffled(groups, order)
    assert sorted(found) == list(range(10))
    for group in groups:
        places = [found.index(item) for item in group]
        assert max(places) - min(places) == len(group) - 1


def test_the_order_differs_from_round_to_round() -> None:
    order = random.Random(0)
    groups = compared_together(range(8), [(0, 1), (2, 3), (4, 5)])
    assert len({tuple(shuffled(groups, order)) for _ in range(20)}) > 15


def test_the_serving_matrix_is_no_single_group() -> None:
    compared = comparisons(POINTS)
    groups = compared_together(cells(compared), [(each.cell, each.reference) for each in compared])
    assert len(groups) > 5 and max(map(len, groups)) < len(cells(compared)) / 2
