"""What the prefix-cache keys of steered requests tell apart, and what they let be shared."""

from __future__ import annotations

import pytest

from headway.server.engine.cache_key import block_keys, cache_keys
from headway.steering import ModelGeometry, SteeringProgram, compile_spec, parse_spec
from headway.steering.positions import PromptFacts
from headway.steering.wire import encode_facts

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(6, 4, 2, 8, 32, supports_images=True)
BLOCK = 16


def program(*methods: dict) -> SteeringProgram:
    return compile_spec(parse_spec({"methods": list(methods)}), GEOMETRY)


VHR = program({"method": "vhr", "heads": [[0, 0]]})
LOCORE = program({"method": "locore"})
VAR = program({"method": "var", "sink_dims": [3]})
EMPHASIS = program({"method": "emphasis", "spans": [{"tokens": [0, 4]}]})


def chain(
    steered: SteeringProgram, facts: PromptFacts, length: int = 64, digest: str = "one"
) -> list[tuple]:
    """Per block, all keys that its hash depends on; hashes are chained."""
    payload = {"facts": encode_facts(facts), "cache_keys": cache_keys(steered, facts, digest)}
    keys: tuple = ()
    blocks = []
    for start in range(0, length, BLOCK):
        keys += tuple(block_keys(payload, start, start + BLOCK))
        blocks.append(keys)
    return blocks


def shared(one: list[tuple], other: list[tuple]) -> int:
    """Leading blocks with equal keys."""
    equal = [a == b for a, b in zip(one, other, strict=True)]
    return equal.index(False) if False in equal else len(equal)


def test_an_edit_of_all_positions_depends_on_the_program_only():
    blocks = chain(VHR, PromptFacts(20))
    assert all(blocks)
    assert shared(blocks, chain(VHR, PromptFacts(50))) == 4
    other = program({"method": "vhr", "heads": [[0, 0]], "alpha": 3.0})
    assert shared(blocks, chain(other, PromptFacts(20))) == 0


def test_heads_chosen_by_the_prompt_are_shared_with_the_same_prompt_only():
    auto = program({"method": "vhr"})
    blocks = chain(auto, PromptFacts(40))
    assert shared(blocks, chain(auto, PromptFacts(40))) == 4
    assert shared(blocks, chain(auto, PromptFacts(40), digest="other")) == 0


def test_locore_shares_the_prompt_with_everyone_and_the_output_with_nobody_else():
    blocks = chain(LOCORE, PromptFacts(40))
    assert blocks[:2] == [(), ()]  # the keys of an unsteered request
    assert blocks[2] and shared(blocks, chain(LOCORE, PromptFacts(40))) == 4
    # In the next turn what was output is prompt: 48 tokens of it now.
    assert shared(blocks, chain(LOCORE, PromptFacts(48))) == 2
    other = program({"method": "locore", "beta": 0.3})
    assert shared(blocks, chain(other, PromptFacts(40))) == 2


def test_output_rows_are_told_apart_by_the_prompt_length_inside_a_block():
    assert shared(chain(LOCORE, PromptFacts(34)), chain(LOCORE, PromptFacts(35))) == 2


def test_sinks_are_part_of_what_var_stores():
    image = ((4, 10),)
    blocks = chain(VAR, PromptFacts(40, image, image))
    assert blocks[0]
    # Only prompt tokens can be sinks, so blocks with output depend on where the prompt ends.
    assert shared(blocks, chain(VAR, PromptFacts(50, image, image))) == 2


def test_marks_enter_with_their_block():
    facts = PromptFacts(60, marks=((18, 20),))
    blocks = chain(EMPHASIS, facts)
    assert shared(blocks, chain(EMPHASIS, PromptFacts(60, marks=((18, 21),)))) == 1
    assert shared(blocks, chain(EMPHASIS, PromptFacts(60, marks=((18, 20), (50, 52))))) == 3


def test_a_mark_over_a_block_boundary_is_in_both():
    one = chain(EMPHASIS, PromptFacts(60, marks=((14, 18),)))
    assert shared(one, chain(EMPHASIS, PromptFacts(60, marks=((14, 19),)))) == 1
    assert shared(one, chain(EMPHASIS, PromptFacts(60, marks=((14, 16),)))) == 1


def test_the_earliest_touched_row_decides_in_a_mixture():
    mixed = program({"method": "locore"}, {"method": "vhr", "heads": [[0, 0]]})
    assert chain(mixed, PromptFacts(40))[0]
    assert shared(chain(mixed, PromptFacts(40)), chain(mixed, PromptFacts(48))) == 2
