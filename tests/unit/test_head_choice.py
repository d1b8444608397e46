"""The choice of heads in a step: what is kept of a text, what is scaled, and what may go wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.kernels.head_selection import select_heads_reference
from headway.server.engine.cpu_plan import CpuPlanner
from headway.server.engine.head_choice import Choice, TextRows, choose_heads, heads_of
from headway.server.engine.request import TEXT, TEXT_PASS
from headway.server.engine.slots import SlotTables
from headway.server.engine.steering_state import SteeringState
from headway.steering import ModelGeometry, SteeringProgram
from headway.steering.head_words import HeadWords
from headway.steering.positions import PromptFacts
from headway.steering.program import HeadEdit, HeadSelection, QueryScope
from headway.steering.wire import encode_facts, encode_program

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(3, 8, 2, 4, 32, supports_images=True)
SELECTION = HeadSelection((0, 2), 1.5)
PROMPT, TEXT_LEN = 6, 3


def payload(name: str, program: SteeringProgram, length: int, **keys: str) -> dict:
    wire = encode_program(program)
    return {**wire, "report_id": name, "facts": encode_facts(PromptFacts(length)), **keys}


def auto(*edits: HeadEdit, baseline: bool = False) -> SteeringProgram:
    selection = HeadSelection(SELECTION.layers, SELECTION.alpha, baseline)
    return SteeringProgram(edits, head_selection=selection)


def state_with(program: SteeringProgram, text: SteeringProgram | None = None) -> SteeringState:
    """A state that has a text pass and the request that is compared with it."""
    state = SteeringState(GEOMETRY, CpuPlanner(SlotTables(GEOMETRY, 4, 64)))
    state.add("text", payload("text", text or SteeringProgram(), TEXT_LEN, **{TEXT_PASS: "k"}))
    state.add("image", payload("image", program, PROMPT, **{TEXT: "k"}))
    return state


def run(state: SteeringState, ids: list[str], counts: list[int], positions: list[int]) -> list:
    """One step over drawn head outputs; returns them before and after, by layer."""
    plan = state.plan_step(ids, counts, positions)
    if plan is None:
        return []
    draw = torch.Generator().manual_seed(sum(positions) + sum(counts))
    seen = []
    for layer in range(GEOMETRY.num_layers):
        before = torch.randn(sum(counts), GEOMETRY.num_heads, GEOMETRY.head_size, generator=draw)
        after = before.clone()
        plan.edit_head_outputs(layer, after)
        seen.append((before, after))
    state.close_step(plan)
    return seen


def test_both_in_one_step():
    state = state_with(auto())
    seen = run(state, ["text", "image"], [TEXT_LEN, PROMPT], [0, 0])
    wanted = []
    for layer, (before, after) in enumerate(seen):
        scale = torch.ones(GEOMETRY.num_heads)
        if layer in SELECTION.layers:
            scale = select_heads_reference(before[-1], before[TEXT_LEN - 1], SELECTION.alpha)
            wanted += [[layer, head] for head in np.flatnonzero(scale != 1).tolist()]
        torch.testing.assert_close(after[TEXT_LEN:], before[TEXT_LEN:] * scale[None, :, None])
        assert torch.equal(after[:TEXT_LEN], before[:TEXT_LEN])  # the text stays raw
    assert not state.take_failed()
    report = state.pop_report("image")
    assert report is not None and report.is_complete and report.heads == wanted and wanted


def test_in_steps_one_after_the_other_and_frozen_then():
    state = state_with(auto())
    first = run(state, ["text"], [TEXT_LEN], [0])
    state.remove(["text"])
    second = run(state, ["image"], [PROMPT], [0])
    scales = [
        select_heads_reference(now[0][-1], then[0][TEXT_LEN - 1], SELECTION.alpha)
        for then, now in zip(first, second, strict=True)
    ]
    run(state, [], [], [])  # it is not in this step: its slot is given back
    assert state.num_placed == 0
    # One more token, then the prompt again, in part.
    for count, position in ((1, PROMPT), (2, 0)):
        for layer, (before, after) in enumerate(run(state, ["image"], [count], [position])):
            scale = scales[layer] if layer in SELECTION.layers else torch.ones(GEOMETRY.num_heads)
            torch.testing.assert_close(after, before * scale[None, :, None])
    assert not state.take_failed()


def test_other_edits_are_scaled_by_it_in_all_their_slots():
    words = HeadWords.scaled(GEOMETRY, [(0, head, 3.0) for head in range(8)])
    state = state_with(auto(HeadEdit(words, QueryScope.FROM_LAST_PROMPT_TOKEN)))
    seen = run(state, ["text", "image"], [TEXT_LEN, PROMPT], [0, 0])
    before, after = seen[0]
    scale = select_heads_reference(before[-1], before[TEXT_LEN - 1], SELECTION.alpha)[None, :, None]
    torch.testing.assert_close(after[TEXT_LEN:-1], before[TEXT_LEN:-1] * scale)
    torch.testing.assert_close(after[-1:], before[-1:] * scale * 3.0)


def test_a_reinforced_baseline_is_scaled_by_the_same_heads():
    state = state_with(auto(baseline=True), auto(baseline=True))
    for layer, (before, after) in enumerate(
        run(state, ["image", "text"], [PROMPT, TEXT_LEN], [0, 0])
    ):
        scale = torch.ones(GEOMETRY.num_heads)
        if layer in SELECTION.layers:
            scale = select_heads_reference(before[PROMPT - 1], before[-1], SELECTION.alpha)
        torch.testing.assert_close(after, before * scale[None, :, None])
    assert not state.take_failed()


def test_a_baseline_that_ran_without_its_request_leaves_nothing_to_compare_with():
    """Its heads were not scaled: who took its rows would choose by the wrong baseline."""
    state = state_with(auto(baseline=True), auto(baseline=True))
    run(state, ["text"], [TEXT_LEN], [0])
    assert state.take_failed() == ("text",)
    run(state, ["image"], [PROMPT], [0])
    assert state.take_failed() == ("image",)
    report = state.pop_report("image")
    assert report is not None and "without its images was not run" in (report.failure or "")


@pytest.mark.parametrize("ids, counts", [(["image"], [PROMPT]), (["image", "text"], [PROMPT, 2])])
def test_without_the_end_of_its_text_a_request_fails_alone(ids, counts):
    state = state_with(auto())
    run(state, ids, counts, [0] * len(ids))
    assert state.take_failed() == ("image",)
    report = state.pop_report("image")
    assert report is not None and "without its images was not run" in (report.failure or "")
    assert report.heads == []


def test_a_prompt_that_was_cut_fails():
    state = state_with(auto())
    run(state, ["text", "image"], [TEXT_LEN, PROMPT - 1], [0, 0])
    report = state.pop_report("image")
    assert report is not None and "was not run at once" in (report.failure or "")


def test_cached_rows_of_the_prompt_are_not_missed():
    state = state_with(auto())
    seen = run(state, ["text", "image"], [TEXT_LEN, 2], [0, PROMPT - 2])
    before, after = seen[0]
    scale = select_heads_reference(before[-1], before[TEXT_LEN - 1], SELECTION.alpha)
    torch.testing.assert_close(after[TEXT_LEN:], before[TEXT_LEN:] * scale[None, :, None])


def test_a_text_pass_leaves_no_report():
    state = state_with(auto())
    run(state, ["text", "image"], [TEXT_LEN, PROMPT], [0, 0])
    state.remove(["text"])
    assert list(state.reports) == ["image"]


def test_ranks_choose_alike():
    """Mean, deviation and median are over the heads of all ranks."""
    draw = torch.Generator().manual_seed(3)
    z, z_text = torch.randn(2, 8, 4, generator=draw)
    whole = select_heads_reference(z, z_text, 2.0)
    parts: list[torch.Tensor] = []
    for start in (0, 4):
        own = slice(start, start + 4)
        choose_heads(z[own], z_text[own], 2.0, own, lambda t: parts.append(t) or t.repeat(1, 2))
    joined = torch.cat(parts, dim=-1)
    for start in (0, 4):
        own = slice(start, start + 4)
        scale = choose_heads(z[own], z_text[own], 2.0, own, lambda _: joined)
        assert torch.equal(scale, whole[own])


def test_a_rank_without_the_text_still_gathers():
    gathered = []

    def scale(z: torch.Tensor, z_text: torch.Tensor, alpha: float) -> torch.Tensor:
        gathered.append(z_text)
        return torch.ones(len(z))

    choice = Choice("image", SELECTION, TextRows(), 0, [0], frozenset({0}))
    with pytest.raises(RuntimeError, match="was not run"):
        choice.choose(0, torch.zeros(1, 8, 4), scale)
    assert len(gathered) == 1 and gathered[0].isnan().all()


def test_heads_are_told_by_their_place_in_the_whole_layer():
    scales = {2: torch.tensor([1.0, 2.0]), 1: torch.tensor([2.0, 2.0])}
    assert heads_of(scales, slice(4, 6)) == [[1, 4], [1, 5], [2, 5]]
