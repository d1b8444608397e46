"""Scopes and runs of positions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.steering.positions import PromptFacts, covers, runs, scope_ranges
from headway.steering.program import QueryScope

pytestmark = pytest.mark.unit

TWO_IMAGES = PromptFacts(30, ((5, 9), (14, 18)), ((5, 9), (14, 18)))


@pytest.mark.parametrize(
    ("scope", "inside", "outside"),
    [
        (QueryScope.ALL, [0, 29, 30, 1000], []),
        (QueryScope.OUTPUT, [30, 31, 1000], [0, 29]),
        (QueryScope.FROM_LAST_PROMPT_TOKEN, [29, 30], [0, 28]),
        # Text after the first image: neither the text before it nor any image token.
        (QueryScope.AFTER_IMAGE, [9, 13, 18, 29, 30, 1000], [0, 4, 5, 8, 14, 17]),
    ],
)
def test_scopes(scope, inside, outside):
    ranges = scope_ranges(scope, TWO_IMAGES)
    assert all(covers(ranges, position) for position in inside)
    assert not any(covers(ranges, position) for position in outside)


def test_without_an_image_no_position_is_after_it():
    assert scope_ranges(QueryScope.AFTER_IMAGE, PromptFacts(9)) == ()
    assert [piece.active for piece in runs([QueryScope.AFTER_IMAGE], PromptFacts(9), 0, 9)] == [()]


@given(
    st.lists(st.sampled_from(list(QueryScope)), min_size=1, max_size=4),
    st.integers(0, 40),
    st.integers(1, 20),
)
def test_runs_cover_a_chunk_once_and_agree_with_the_scopes(scopes, start, length):
    pieces = runs(scopes, TWO_IMAGES, start, start + length)
    assert [piece.start for piece in pieces] == [start, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == start + length
    for piece in pieces:
        for position in range(piece.start, piece.stop):
            active = tuple(
                index
                for index, scope in enumerate(scopes)
                if covers(scope_ranges(scope, TWO_IMAGES), position)
            )
            assert piece.active == active


@given(st.integers(0, 39), st.integers(1, 40))
def test_chunks_do_not_matter(cut, length):
    """What is active at a position is the same however the prompt is cut."""
    scopes = list(QueryScope)

    def active(start: int, stop: int) -> list[tuple[int, ...]]:
        return [
            piece.active
            for piece in runs(scopes, TWO_IMAGES, start, stop)
            for _ in range(piece.start, piece.stop)
        ]

    cut = min(cut, length - 1)
    whole = active(0, length)
    parts = (active(0, cut) if cut else []) + active(cut, length)
    assert whole == parts
