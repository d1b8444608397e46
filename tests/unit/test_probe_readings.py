"""What a worker keeps of what probes read, without an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from headway.server.engine import kept_reports
from headway.server.engine.client import engine_report
from headway.server.engine.cpu_plan import CpuPlanner
from headway.server.engine.report import EngineReport
from headway.server.engine.slots import SlotTables
from headway.server.engine.steering_state import SteeringState
from headway.steering import ModelGeometry, SteeringProgram, compile_spec, parse_spec
from headway.steering.positions import PromptFacts
from headway.steering.profiles import NamedProfiles
from headway.steering.vectors import FeedbackRule
from headway.steering.wire import encode_facts, encode_program
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

BARE = ModelGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_size=8, hidden_size=32)
PROFILES = {
    "taught": drawn_profile(BARE, layers=(0, 1), feedback=FeedbackRule()),
    "fixed": drawn_profile(BARE, layers=(0, 1), seed=1),
    "calm": drawn_profile(BARE, "caa", layers=(2,)),
}
GEOMETRY = replace(BARE, profiles=NamedProfiles(PROFILES))
POINTS = range(7)
PROMPT_LEN = 5
TAUGHT = {"method": "gact", "profile": "taught"}


def program(*methods: dict[str, Any]) -> SteeringProgram:
    return compile_spec(parse_spec({"methods": list(methods or [TAUGHT])}), GEOMETRY)


def payload(report_id: str, *methods: dict[str, Any]) -> dict[str, Any]:
    return {
        "report_id": report_id,
        **encode_program(program(*methods)),
        "facts": encode_facts(PromptFacts(PROMPT_LEN)),
    }


def new_state(**tables: Any) -> SteeringState:
    return SteeringState(GEOMETRY, CpuPlanner(SlotTables(GEOMETRY, 4, **tables)))


def stream_of(name: str, position: int, point: int) -> torch.Tensor:
    """What is in the residual stream there before the edits of this point."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1000 + position * 10 + point)
    return torch.randn(32, generator=generator)


def run_step(
    state: SteeringState,
    batch: dict[str, tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    parts: int = 1,
) -> None:
    """A step over positions [start, stop) of each request; parts: of the stream."""
    counts = [stop - start for start, stop in batch.values()]
    plan = state.plan_step(list(batch), counts, [start for start, _ in batch.values()])
    if plan is None:
        return
    for point in POINTS:
        rows = [
            stream_of(name, position, point)
            for name, (start, stop) in batch.items()
            for position in range(start, stop)
        ]
        hidden = (torch.stack(rows) / parts).to(dtype)
        plan.edit_residual(point, hidden, hidden.clone() if parts == 2 else None)
    state.close_step(plan)


def expected(name: str, dtype: torch.dtype = torch.float32) -> dict[int, tuple[int, np.ndarray]]:
    """Point -> cluster and row of the profile that takes feedback, at the last prompt position."""
    found = {}
    for layer, artifact in PROFILES["taught"].artifacts.items():
        point = 2 * layer + 2
        x = stream_of(name, PROMPT_LEN - 1, point).to(dtype).float().numpy()
        unit = x / np.sqrt(np.mean(x**2))
        logits = artifact.probe_weights @ unit + artifact.probe_bias
        found[point] = int(logits.argmax()), unit
    return found


def check(report: EngineReport | None, name: str, dtype: torch.dtype = torch.float32) -> None:
    assert report is not None and report.is_complete
    wanted = expected(name, dtype)
    assert [point for point, _, _ in report.probes] == list(wanted)
    for point, cluster, row in report.probes:
        assert cluster == wanted[point][0]
        np.testing.assert_allclose(np.frombuffer(row, "<f4"), wanted[point][1], atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_is_kept_as_the_probe_reads_it(dtype: torch.dtype, parts: int) -> None:
    """Beside requests that are not steered, that do not ask, and that edit more than they ask."""
    state = new_state()
    state.add("a", payload("a"))
    state.add("b", payload("b", {"method": "gact", "profile": "fixed"}))
    state.add("c", payload("c", {**TAUGHT, "scope": "all"}, {"method": "caa", "profile": "calm"}))
    run_step(state, {"a": (0, 5), "x": (0, 3), "b": (0, 5), "c": (0, 5)}, dtype, parts)
    run_step(state, {"a": (5, 6), "b": (5, 6), "c": (5, 6)}, dtype, parts)
    for name in "ac":
        check(state.pop_report(name), name, dtype)
    report = state.pop_report("b")
    assert report is not None and report.is_complete and report.probes == []
    assert state.reports.probes == {}


@pytest.mark.parametrize(
    "methods",
    [
        [{**TAUGHT, "cluster": 1}],
        [{**TAUGHT, "scope": "output"}],
        [{"method": "gact", "profile": "fixed"}],
        [{"method": "caa", "profile": "calm"}],
    ],
)
def test_nothing_is_planned_for_who_does_not_ask(methods: list[dict[str, Any]]) -> None:
    state = new_state()
    state.add("a", payload("a", *methods))
    plan = state.plan_step(["a"], [5], [0])
    assert plan is None or plan.probe_rows == ()  # type: ignore[attr-defined]
    assert state.reports.probes == {}


def test_prompts_may_come_in_chunks_and_again() -> None:
    state = new_state()
    state.add("a", payload("a"))
    run_step(state, {"a": (0, 2)})
    assert state.reports.probes == {}
    run_step(state, {"a": (2, 4)})
    run_step(state, {"a": (4, 5)})
    run_step(state, {"a": (5, 6)})
    run_step(state, {"x": (0, 3)})  # preempted
    run_step(state, {"a": (0, 7)})  # and computed again
    check(state.pop_report("a"), "a")
    state = new_state()
    state.add("a", payload("a"))
    run_step(state, {"a": (4, 5)})  # the rest was cached
    state.preempt(["a"])  # the way of runners that add it again
    state.add("a", payload("a"))
    run_step(state, {"a": (5, 6)})
    check(state.pop_report("a"), "a")


def test_of_several_sequences_the_first_counts() -> None:
    state = new_state()
    for name in ("0_a", "1_a"):
        state.add(name, payload("a"))
    run_step(state, {"1_a": (0, 2), "0_a": (0, 5)})
    run_step(state, {"0_a": (5, 6), "1_a": (2, 5)})
    check(state.pop_report("a"), "0_a")


def test_what_nobody_asks_for_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_reports, "MAX_REPORTS", 1)
    state = new_state()
    for name in "ab":
        state.add(name, payload(name))
        run_step(state, {name: (0, 5)})
        state.remove([name])
    assert list(state.reports.probes) == list(state.reports) == ["b"]


def test_ranks_tell_their_own_points_and_engines_the_first() -> None:
    first, second = (EngineReport(1, 9, 9, probes=[]) for _ in range(2))
    first.probes, second.probes = [[2, 0, b"x"]], [[4, 1, b"y"], [2, 1, b"z"]]
    both = [[2, 0, b"x"], [4, 1, b"y"]]
    stages = engine_report([first.as_dict(), None, second.as_dict()])
    assert stages is not None and stages.probes == both
    assert first.merge(second).probes == both


def test_stages_of_a_pipeline_read_at_their_own_layers() -> None:
    """Point 2 is the output of layer 0, which enters layer 1."""
    read = []
    for layers in (range(0, 1), range(1, 3)):
        state = new_state(layers=layers)
        state.add("a", payload("a"))
        run_step(state, {"a": (0, 5)})
        report = state.pop_report("a")
        assert report is not None
        read.append([point for point, _, _ in report.probes])
    assert read == [[], [2, 4]]


def test_a_report_crosses_to_the_front_end_as_it_is() -> None:
    state = new_state()
    state.add("a", payload("a"))
    run_step(state, {"a": (0, 5)})
    report = state.pop_report("a")
    assert report is not None
    crossed = MsgpackDecoder(dict).decode(MsgpackEncoder().encode(report.as_dict()))
    check(EngineReport(**crossed), "a")
