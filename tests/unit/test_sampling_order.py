"""The order in which a gate draws candidates: of which distribution, and what it hangs on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.server.engine.sampling_gate import Gate
from headway.steering.program import SamplingGate

pytestmark = pytest.mark.unit

RULE = SamplingGate(0.5, 4, 2, 3)
EVEN = np.full(8, 1 / 8)


def test_the_order_is_that_of_drawing_without_replacement():
    """Chi-square over all 24 orders of four candidates, one draw for each of 20000 positions."""
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    gate, count = Gate(RULE, 11), 20000
    found: dict[tuple[int, ...], int] = dict.fromkeys(permutations(range(4)), 0)
    for position in range(count):
        found[tuple(gate.order(shares, position, False))] += 1
    statistic = 0.0
    for order, times in found.items():
        probability, left = 1.0, 1.0
        for index in order:
            probability *= shares[index] / left
            left -= shares[index]
        statistic += (times - count * probability) ** 2 / (count * probability)
    assert statistic < 49.7  # 23 degrees of freedom: more in one of a thousand


def test_draws_of_neighbouring_positions_are_independent():
    """Of 8 equal candidates: the fifth draw, from 4, against the first of the next position."""
    agree = 0
    for seed in range(2000):
        gate = Gate(RULE, seed)
        order, later = (gate.order(EVEN, position, False) for position in (30, 31))
        left = sorted(set(range(8)) - set(order[:4]))
        agree += left.index(order[4]) == later[0] // 2
    assert 400 < agree < 600


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(1, 32))
def test_draws_hang_on_seed_and_position_alone(seed, position, count):
    shares = np.random.default_rng(count).dirichlet(np.ones(count))
    fresh, used = Gate(None, seed), Gate(RULE, seed, frozenset([1]))
    used.order(EVEN, position + 1, False)
    used.decide(position, [1, 2], [0, 1], [0.5, 0.5])
    order = fresh.order(shares, position, False)
    assert sorted(order) == list(range(count))
    assert used.order(shares, position, False) == order == fresh.order(shares, position, False)


@pytest.mark.parametrize(
    "seeds", [(0, 1), (-2, -3), (-2, 0), (2**63 + 1, 2**63 + 2), (2**63 - 1, 2**63)]
)
def test_other_seeds_and_positions_draw_otherwise(seeds):
    one, two = (Gate.of(RULE, seed, ()) for seed in seeds)
    orders = [[gate.order(EVEN, at, False) for at in range(9)] for gate in (one, two)]
    assert orders[0] != orders[1]
    assert len({tuple(order) for order in orders[0]}) > 1


def test_any_seed_is_used_where_none_is_given():
    one, two = Gate.of(RULE, None, [4]), Gate.of(RULE, None, [4])
    assert one.seed != two.seed and one.end_tokens == {4}


def test_greedy_candidates_come_in_the_order_of_their_probability():
    for position in range(20):
        assert Gate(RULE, position).order(EVEN[:5], position, True) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("greedy", [False, True])
def test_what_has_no_probability_is_never_drawn(greedy):
    shares = np.array([0.9, 0.1, 1e-30, 0.0, 0.0])
    orders = {tuple(Gate(RULE, 3).order(shares, at, greedy)) for at in range(500)}
    assert orders == ({(0, 1, 2)} if greedy else {(0, 1, 2), (1, 0, 2)})
    assert Gate(RULE, 3).order(np.full(3, np.nan), 0, greedy) == []
