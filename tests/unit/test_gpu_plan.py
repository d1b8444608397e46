"""The GPU path without a GPU: what a captured graph would do, and what its recording contains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from headway.server.engine import gpu_buffers, gpu_plan, gpu_readings, kept_reports
from headway.server.engine.gpu_plan import GpuPlanner, GpuStepPlan
from headway.server.engine.gpu_tables import GpuTables
from headway.server.engine.steering_state import SteeringState
from headway.server.engine.step_plan import AttentionCall
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.positions import PromptFacts
from headway.steering.program import ResidualEdit, SteeringProgram
from headway.steering.wire import encode_facts, encode_program
from tests.kernels.batches import Batch
from tests.residual import drawn_artifact, residual_program

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(2, 4, 2, 32, 128, supports_images=True)
SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "block_size": 16}
LENGTHS = [(70, 1), (33, 1), (50, 1), (40, 1)]
PROMPT_LEN, IMAGE = 30, ((4, 20),)
MAX_REQS = 8

VAR = {"method": "var", "sink_dims": [3], "tau": 2.0, "layers": [0, 1], "rho": 0.0}
LOCORE = {"method": "locore", "layers": [1], "beta": 1.5}
VHR = {"method": "vhr", "heads": [[0, 1], [1, 3]], "alpha": 2.0}
ARTIFACT = drawn_artifact(1, 128)
ADDED = residual_program(ResidualEdit(0, ARTIFACT.digest, 0.5), ResidualEdit(1, ARTIFACT.digest, 1))
UNIFORM = {"method": "head_ablation", "mode": "uniform", "heads": [[0, 2]]}


def payload(name: str, *methods: dict[str, Any]) -> dict[str, Any]:
    spec = {"methods": list(methods), "report": "full"}
    return encoded(name, compile_spec(parse_spec(spec), GEOMETRY))


def encoded(name: str, program: SteeringProgram) -> dict[str, Any]:
    facts = encode_facts(PromptFacts(PROMPT_LEN, image_spans=IMAGE, image_tokens=IMAGE))
    return {"report_id": name, **encode_program(program), "facts": facts}


class Worker:
    """A worker's steering, and vLLM's persistent buffers for steps of one row a request."""

    def __init__(self, seed: int = 0) -> None:
        self.tables = GpuTables(GEOMETRY, MAX_REQS, 128)
        self.planner = GpuPlanner(
            self.tables, 64, "cpu", num_sms=1, can_tag=True, captures_residual=True
        )
        self.state = SteeringState(GEOMETRY, self.planner)
        self.state.artifacts.load([ARTIFACT])
        self.batch = Batch(seed, torch.float32, SHAPE, LENGTHS, "nhd")
        draw = torch.Generator().manual_seed(seed)
        self.query = torch.randn(MAX_REQS, 4, 32, generator=draw)
        self.drawn = torch.randn(MAX_REQS, 128, generator=draw)
        self.hidden = self.drawn.clone()
        self.output = torch.empty(MAX_REQS, 4, 32)
        self.query_start_loc = torch.zeros(MAX_REQS + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(MAX_REQS, dtype=torch.int32)
        self.block_table = torch.zeros(MAX_REQS, self.batch.block_table.shape[1]).int()
        self.slot_mapping = torch.full((64,), -1, dtype=torch.int64)
        self.told: list[torch.Tensor] = []
        self.replay: Callable[[], torch.Tensor]
        for layer in range(GEOMETRY.num_layers):
            slots = len(self.batch.cache) * SHAPE["block_size"]
            self.planner.bind_cache(layer, slots, self.slot_mapping)
            self.planner.sink_tags[layer].copy_(self.batch.slot_tags)

    def schedule(self, names: list[str]) -> GpuStepPlan | None:
        """Fill vLLM's buffers with one row a request, and plan the step."""
        count = len(names)
        self.hidden.copy_(self.drawn)
        self.query_start_loc[: count + 1] = torch.arange(count + 1)
        self.query_start_loc[count + 1 :] = count
        self.seq_lens.zero_()
        self.seq_lens[:count] = torch.tensor([length for length, _ in LENGTHS[:count]])
        self.block_table.zero_()
        self.block_table[:count] = self.batch.block_table[:count].clamp_min(0)
        positions = [length - 1 for length, _ in LENGTHS[:count]]
        plan = self.state.plan_step(names, [1] * count, positions)
        assert plan is None or isinstance(plan, GpuStepPlan)
        if plan is None:
            self.planner.idle()
        return plan

    def run(self, plan: GpuStepPlan, num_reqs: int = 4) -> torch.Tensor:
        """All layers of a step; the base kernel writes -1. Returns the outputs of all layers."""
        outputs = []
        for layer in range(GEOMETRY.num_layers):
            output = self.output[:num_reqs]
            call = AttentionCall(
                self.query[:num_reqs],
                self.batch.cache,
                output,
                self.block_table[:num_reqs],
                self.query_start_loc[: num_reqs + 1],
                self.seq_lens[:num_reqs],
                self.slot_mapping[:num_reqs],
                0.2,
                0.0,
                -1,
                max_query_len=1,
                max_seq_len=128,
            )
            plan.edit_residual(2 * layer, self.hidden[:num_reqs], None)
            plan.observe_residual(layer, self.hidden[:num_reqs], None)
            if plan.attends(layer):
                plan.edit_attention(layer, call, self.base)
            else:
                self.base(None)
            plan.edit_head_outputs(layer, output)
            outputs.append(output.clone())
        return torch.stack(outputs)

    def base(self, seq_lens: torch.Tensor | None) -> None:
        self.told.append(self.seq_lens if seq_lens is None else seq_lens)
        self.output.fill_(-1.0)


@contextmanager
def recording(launches: list[Callable[[], None]]) -> Iterator[None]:
    """Triton launches are noted down instead of run, as a CUDA graph does."""
    original = GridExecutor.__call__

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(lambda: original(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", note)
        yield


def capture(worker: Worker) -> None:
    """Record a graph for 4 requests, with nothing to do: the launches and the base kernel."""
    launches: list[Callable[[], None]] = []
    outputs: list[torch.Tensor] = []
    worker.schedule([])
    base = worker.base

    def note_base(seq_lens: torch.Tensor | None) -> None:
        launches.append(lambda: base(seq_lens))

    with pytest.MonkeyPatch.context() as patch, recording(launches):
        patch.setattr(worker, "base", note_base)
        original = GpuStepPlan.edit_head_outputs

        def edit(self: Any, layer: int, output: torch.Tensor) -> None:
            original(self, layer, output)
            launches.append(lambda: outputs.append(output.clone()))

        patch.setattr(GpuStepPlan, "edit_head_outputs", edit)
        worker.run(worker.planner.captured)

    def replay() -> torch.Tensor:
        outputs.clear()
        for launch in launches:
            launch()
        return torch.stack(outputs)

    worker.replay = replay


def add_all(worker: Worker) -> None:
    worker.state.add("a", payload("a", VAR))
    worker.state.add("b", payload("b", LOCORE, VHR))
    worker.state.add("c", payload("c", UNIFORM))
    worker.state.add("d", encoded("d", ADDED))


def test_a_captured_launch_does_what_each_later_step_says():
    """Recorded with nothing to do, replayed for steered batches, an idle one, and a shorter one."""
    worker, eager = Worker(), Worker()
    capture(worker)
    add_all(worker)
    add_all(eager)
    for names in (["a", "b", "c", "x"], ["x", "y", "z", "w"], ["b", "a"], ["d", "c", "b"]):
        plan, expected = worker.schedule(names), eager.schedule(names)
        got = worker.replay()
        if expected is None:
            assert plan is None and (got == -1.0).all()
            assert torch.equal(worker.hidden, worker.drawn)
            continue
        want = eager.run(expected)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert (want[:, : len(names)] != -1.0).any()
        torch.testing.assert_close(worker.hidden, eager.hidden, rtol=0, atol=1e-6)
        assert torch.equal(worker.hidden[0], worker.drawn[0]) != ("d" in names)
        assert plan is not None
        plan.replayed(worker.planner.captured, attention=True)
        worker.state.close_step(plan)
        eager.state.close_step(expected)
    assert worker.state.take_failed() == ()
    for name in "abcd":
        ours, theirs = worker.state.pop_report(name), eager.state.pop_report(name)
        assert ours is not None and ours == theirs
        assert name != "a" or (ours.readings["met"] and ours.readings["masses"])


class OnlyViews(TorchDispatchMode):
    """Refuses what would allocate, copy or wait on a stream that is being captured."""

    ALLOWED = ("view", "select", "slice", "reshape", "alias", "detach", "expand", "split")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name.strip("_").split("_")[0] in self.ALLOWED or name in self.ALLOWED, name
        return func(*args, **(kwargs or {}))


def test_the_step_path_neither_allocates_nor_waits():
    """Everything between the plan and the launches, captured or eager."""
    worker = Worker()
    add_all(worker)
    launches: list[Callable[[], None]] = []
    plan = worker.schedule(["a", "b", "c", "d"])
    assert plan is not None
    with pytest.MonkeyPatch.context() as patch, recording(launches):
        patch.setattr(worker, "base", lambda seq_lens: None)
        # What this test's own worker does to keep the outputs.
        patch.setattr(torch.Tensor, "clone", lambda self: self)
        patch.setattr(torch, "stack", lambda tensors: None)
        for each in (worker.planner.captured, plan):
            before = len(launches)
            with OnlyViews():
                worker.run(each)
            assert len(launches) > before
    with pytest.raises(AssertionError, match="_local_scalar_dense"), OnlyViews():
        worker.seq_lens[0].item()


def test_steady_decode_uploads_nothing(monkeypatch):
    worker = Worker()
    add_all(worker)
    assert worker.schedule(["a", "b", "x"]) is not None
    uploads: list[Any] = []
    monkeypatch.setattr(gpu_buffers, "upload", lambda *args: uploads.append(args))
    assert worker.schedule(["a", "b", "x"]) is not None
    assert not uploads
    assert worker.schedule(["b", "a", "x"]) is not None
    assert uploads


def test_the_base_kernel_is_told_to_leave_out_what_is_replaced():
    """`a` edits all heads of both layers, `b` of layer 1, `c` one head of layer 0."""
    worker = Worker()
    add_all(worker)
    plan = worker.schedule(["a", "b", "c", "x"])
    assert plan is not None
    worker.run(plan)
    assert [each[:4].tolist() for each in worker.told] == [[1, 33, 50, 40], [1, 1, 50, 40]]


def test_a_launch_that_fails_ends_its_requests_and_no_other(monkeypatch):
    worker = Worker()
    add_all(worker)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no code for this device")

    monkeypatch.setattr(gpu_plan, "segment_attention", fail)
    worker.state.add("e", payload("e", VHR))
    plan = worker.schedule(["a", "e", "c", "x"])
    assert plan is not None
    outputs = worker.run(plan)
    assert (outputs[:, [0, 2, 3]] == -1.0).all()  # from the base kernel, told the truth
    assert (outputs[0, 1, 1] == -2.0).all()
    assert worker.told[-1] is worker.seq_lens
    worker.state.close_step(plan)
    assert set(worker.state.take_failed()) == {"a", "c"}


def test_an_edit_that_neither_ran_nor_was_replayed_is_missed():
    worker = Worker()
    add_all(worker)
    plan = worker.schedule(["a", "b"])
    assert plan is not None
    plan.replayed(worker.planner.captured, attention=False)
    worker.state.close_step(plan)
    assert set(worker.state.take_failed()) == {"a", "b"}


def test_a_preempted_request_comes_back_as_it_was():
    """It keeps what was read: three steps with two preemptions count as three without."""
    worker, undisturbed = Worker(), Worker()
    add_all(worker)
    add_all(undisturbed)
    for step in range(3):
        for each in (worker, undisturbed):
            plan = each.schedule(["a", "b"])
            assert plan is not None
            each.run(plan)
            each.state.close_step(plan)
        if step < 2:
            worker.state.preempt(["a", "nobody"])
            assert worker.schedule(["b"]) is not None
            worker.state.add("a", payload("a", VAR))
    report = worker.state.pop_report("a")
    assert report is not None and report.sequences == 1
    assert report.positions_edited == 3 and report.readings["considered"] == 3 * 2 * 4
    assert report == undisturbed.state.pop_report("a")
    assert report.readings["masses"]


def test_readings_that_nobody_asks_for_leave_the_device(monkeypatch):
    """With room for one: the first request's are brought to the host when the second ends."""
    monkeypatch.setattr(gpu_readings, "MAX_KEPT", 1)
    worker = Worker()
    for name in "ab":
        worker.state.add(name, payload(name, VAR))
    plan = worker.schedule(["a", "b"])
    assert plan is not None
    worker.run(plan)
    worker.state.close_step(plan)
    kept = [worker.state.reports.readings[name] for name in "ab"]
    worker.state.remove(["a", "b"])
    assert not kept[0].parts and kept[0].last is not None
    assert kept[1].parts and kept[1].last is None
    for name in "ab":
        report = worker.state.pop_report(name)
        assert report is not None and report.readings["masses"]


def test_a_request_without_room_for_its_readings_fails_alone():
    worker = Worker()
    worker.planner.readings._free.clear()
    add_all(worker)
    plan = worker.schedule(["a", "d", "x"])
    assert plan is not None and [span.request_id for span in plan.spans] == ["d"]
    worker.run(plan)
    worker.state.close_step(plan)
    assert worker.state.take_failed() == ("a",)


def test_a_report_that_is_forgotten_gives_its_readings_back(monkeypatch):
    monkeypatch.setattr(kept_reports, "MAX_REPORTS", 1)
    worker = Worker()
    free = len(worker.planner.readings._free)
    worker.state.add("a", payload("a", VAR))
    assert worker.schedule(["a", "x"]) is not None
    assert len(worker.planner.readings._free) == free - 1
    worker.state.add("d", encoded("d", ADDED))
    assert len(worker.planner.readings._free) == free


def test_a_request_that_comes_back_keeps_its_artefact():
    worker = Worker()
    worker.state.add("d", encoded("d", ADDED))
    assert worker.schedule(["d", "x"]) is not None
    worker.state.preempt(["d"])
    assert worker.state.artifacts.unload([ARTIFACT.digest]) == 1
    worker.state.add("d", encoded("d", ADDED))
    plan = worker.schedule(["d", "x"])
    assert plan is not None and plan.spans
    worker.state.add("e", encoded("e", ADDED))
    assert worker.state.take_failed() == ("e",)
