"""Requests, slots and layouts of one worker, without an engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.kernels.head_affine import head_affine_reference
from headway.server.engine import cpu_plan
from headway.server.engine.slots import SLOTS_PER_REQUEST, SlotTables
from headway.server.engine.steering_state import SteeringState
from headway.server.engine.step_plan import StepPlan
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.positions import PromptFacts
from headway.steering.wire import encode_facts, encode_program

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, hidden_size=32)


def payload(report_id: str, *scales: tuple[int, int, float]) -> dict:
    spec = {"methods": [{"method": "head_scale", "scales": [list(entry) for entry in scales]}]}
    return {
        "report_id": report_id,
        **encode_program(compile_spec(parse_spec(spec), GEOMETRY)),
        "facts": encode_facts(PromptFacts(5)),
    }


def state(max_num_seqs: int = 4, **tables) -> SteeringState:
    return SteeringState(
        GEOMETRY, cpu_plan.CpuPlanner(SlotTables(GEOMETRY, max_num_seqs, **tables))
    )


def plan_step(steering: SteeringState, batch: dict[str, int]) -> StepPlan | None:
    """Every request computes its first tokens."""
    return steering.plan_step(list(batch), list(batch.values()), [0] * len(batch))


def run_step(steering: SteeringState, batch: dict[str, int]) -> list[torch.Tensor]:
    """One step over all layers; the attention output is all ones before the edit."""
    plan = plan_step(steering, batch)
    outputs = []
    for layer in range(GEOMETRY.num_layers):
        output = torch.ones(sum(batch.values()), 4 * 8)
        if plan is not None:
            plan.edit_head_outputs(layer, output)
        outputs.append(output.view(-1, 4, 8))
    if plan is not None:
        steering.close_step(plan)
    return outputs


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([1, cpu_plan.GATHER_LIMIT]))
def test_every_row_gets_its_own_edit(data, gather_limit):
    """Drawn batches over several steps, some requests unsteered, gathered at once or by layer."""
    steering = state(max_num_seqs=6)
    names = [f"r{index}" for index in range(6)]
    scales: dict[str, torch.Tensor] = {}
    for name in names:
        if data.draw(st.booleans()):
            layer, head = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
            scale = data.draw(st.sampled_from([0.0, 0.5, 2.0, 3.0]))
            steering.add(name, payload(name, (layer, head, scale)))
            scales[name] = torch.ones(3, 4)
            scales[name][layer, head] = scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_plan, "GATHER_LIMIT", gather_limit)
        for _ in range(3):
            present = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            batch = {name: data.draw(st.integers(1, 4)) for name in present}
            outputs = run_step(steering, batch)
            for layer, output in enumerate(outputs):
                row = 0
                for name, count in batch.items():
                    expected = torch.ones(count, 4, 8)
                    if name in scales:
                        scale = scales[name][layer].expand(count, 4)
                        expected = head_affine_reference(expected, scale)
                    assert torch.equal(output[row : row + count], expected)
                    row += count
    assert steering.take_failed() == ()


def test_reports_count_positions():
    steering = state()
    steering.add("a", payload("report", (0, 0, 2.0)))
    steering.add("b", payload("report", (0, 0, 2.0)))
    run_step(steering, {"a": 5, "x": 7, "b": 3})
    run_step(steering, {"a": 1, "b": 1})
    report = steering.pop_report("report")
    assert (report.sequences, report.positions_edited, report.positions_computed) == (2, 10, 10)
    assert report.is_complete
    assert steering.pop_report("report") is None


def test_the_time_of_a_step_is_that_of_each_request_in_it():
    steering = state()
    for name, report in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "three")):
        steering.add(name, payload(report, (0, 0, 2.0)))
    run_step(steering, {"a": 5, "b": 3, "c": 2, "x": 1})
    first = steering.step_seconds.sum
    run_step(steering, {"c": 1, "x": 1})
    one, two, three = (steering.reports.of(name).seconds for name in ("one", "two", "three"))
    assert first > 0 and one == pytest.approx(first)  # its sequences ran together
    assert two == pytest.approx(steering.step_seconds.sum) and two > one
    assert three == 0


def test_slots_are_held_by_requests_in_the_batch_only():
    steering = state(max_num_seqs=2)
    for name in "abc":
        steering.add(name, payload(name, (0, 0, 2.0)))
    run_step(steering, {"a": 1, "b": 1})
    assert steering.tables.num_used == 2
    run_step(steering, {"b": 1, "c": 1})  # a was preempted; c takes its slot
    assert steering.tables.num_used == 2
    assert steering.take_failed() == ()
    steering.remove(["a", "b", "c"])
    assert steering.tables.num_used == 0


def test_without_a_free_slot_the_request_fails_and_no_other():
    steering = state(max_num_seqs=1)
    names = "acdeb"[: SLOTS_PER_REQUEST + 1]
    for name in names:
        steering.add(name, payload(name, (0, 0, 2.0)))
    run_step(steering, dict.fromkeys(names, 1))
    assert steering.take_failed() == ("b",)
    assert steering.pop_report("a").is_complete
    assert steering.pop_report("b").failed_stage == "slot"


def test_a_layer_of_another_pipeline_stage_is_not_missed():
    steering = state(layers=range(1, 3))
    steering.add("a", payload("a", (0, 0, 2.0), (1, 0, 2.0)))
    plan = plan_step(steering, {"a": 1})
    assert plan.layout.layers == {1}
    plan.edit_head_outputs(1, torch.ones(1, 32))
    steering.close_step(plan)
    assert steering.pop_report("a").is_complete


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_own_heads(rank):
    steering = state(rank=rank, world_size=2)
    steering.add("a", payload("a", (0, 1, 2.0), (0, 2, 3.0)))
    plan = plan_step(steering, {"a": 1})
    output = torch.ones(1, 2 * 8)
    plan.edit_head_outputs(0, output)
    assert output.view(2, 8)[:, 0].tolist() == ([1.0, 2.0] if rank == 0 else [3.0, 1.0])


def test_a_step_without_steered_requests_has_no_plan():
    steering = state()
    assert plan_step(steering, {"x": 3}) is None
    steering.add("a", payload("a", (0, 0, 2.0)))
    assert plan_step(steering, {"x": 3}) is None
    assert plan_step(steering, {"x": 3, "a": 1}) is not None


def test_a_steady_batch_keeps_its_layout():
    steering = state()
    steering.add("a", payload("a", (0, 0, 2.0)))
    first = plan_step(steering, {"a": 1}).layout
    assert plan_step(steering, {"a": 1}).layout is first
    assert plan_step(steering, {"a": 2}).layout is not first
