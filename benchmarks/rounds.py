"""The order of a round: what is compared runs close together, for the machine's speed drifts."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def compared_together(
    items: Sequence[Item], pairs: Iterable[tuple[Item, Item]]
) -> list[list[Item]]:
    """The items in groups, so that the two of every pair are in one, and no group could be two."""
    groups = {item: [item] for item in items}
    for one, other in pairs:
        if groups[one] is not groups[other]:
            joined = groups[one] + groups[other]
            groups |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in groups.values()}.values())


def shuffled(groups: Sequence[Sequence[Item]], order: random.Random) -> list[Item]:
    """All items, group after group, the groups and what is in each in random order."""
    return [
        item
        for group in order.sample(groups, len(groups))
        for item in order.sample(group, len(group))
    ]
