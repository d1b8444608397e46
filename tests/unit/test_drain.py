"""An engine that is shutting down answers Headway's calls, and waits for those that must come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

from headway.server.engine import drain
from headway.server.engine.drain import MAX_OWED, WAIT_SECONDS, OwedReports, own_call
from headway.server.engine.request import EXTRA_ARG

pytestmark = pytest.mark.unit


def test_a_report_is_owed_until_it_is_asked_for():
    owed = OwedReports()
    assert not owed.wait(0.0)
    owed.add("a")
    owed.add("a")  # a second sequence of the same request
    assert owed.wait(10.0)
    assert owed.wait(10.0 + WAIT_SECONDS - 0.1)
    owed.paid("a")
    owed.paid("never seen")
    assert not owed.wait(10.1)


def test_nobody_waits_for_ever():
    owed = OwedReports()
    owed.add("a")
    assert owed.wait(10.0)
    assert not owed.wait(10.0 + WAIT_SECONDS)


def test_what_is_remembered_is_bounded():
    owed = OwedReports()
    for index in range(MAX_OWED + 1):
        owed.add(str(index))
    for index in range(1, MAX_OWED + 1):
        owed.paid(str(index))
    assert not owed.wait(0.0)


@pytest.mark.parametrize(
    ("method", "args", "expected"),
    [
        (
            "collective_rpc",
            ["headway_pop_report", None, ["r"], None],
            ("headway_pop_report", ("r",)),
        ),
        ("collective_rpc", ["headway_statistics", None, (), None], ("headway_statistics", ())),
        ("collective_rpc", ["save_model", None, (), None], None),
        ("collective_rpc", [], None),
        ("add_lora", ["headway_x"], None),
    ],
)
def test_which_calls_are_ours(method, args, expected):
    assert own_call(method, args) == expected


class Engine(EngineCoreProc):
    """vLLM's engine process, without a model: the loop's methods are its own."""

    def __init__(self, shutdown_timeout: int = 60) -> None:
        self.vllm_config = SimpleNamespace(shutdown_timeout=shutdown_timeout)
        self.shutdown_state = EngineShutdownState.SHUTTING_DOWN
        self.engines_running = False
        self.batch_queue = None
        self.scheduler = SimpleNamespace(has_requests=lambda: False)
        self.called: list[str] = []
        self.output_queue = SimpleNamespace(put_nowait=self.answers)

    def answers(self, item) -> None:
        self.called.append(item[1].utility_output.failure_message or "answered")

    def add_request(self, request, wave=0) -> None:
        pass

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        return [method]

    def receive(self, kind, request) -> None:
        self._handle_client_request(kind, request)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The seam, for this test only; in other processes it stays."""
    for name in ("_handle_client_request", "_reject_utility_in_shutdown", "has_work"):
        method = getattr(EngineCoreProc, name)
        monkeypatch.setattr(EngineCoreProc, name, getattr(method, "__wrapped__", method))
    drain.install()


def utility(method: str, *args: object) -> tuple:
    return 0, 1, "collective_rpc", [method, None, list(args), None]


def steered(engine: Engine, report_id: str = "r") -> None:
    """A steered request that came in time, and has ended since."""
    engine.shutdown_state = EngineShutdownState.RUNNING
    params = SimpleNamespace(extra_args={EXTRA_ARG: {"report_id": report_id}})
    engine.receive(EngineCoreRequestType.ADD, (SimpleNamespace(sampling_params=params), 0))
    engine.shutdown_state = EngineShutdownState.SHUTTING_DOWN


def test_it_stays_until_the_report_was_asked_for():
    engine = Engine()
    assert not engine.has_work()
    steered(engine)
    assert engine.has_work()
    engine.receive(EngineCoreRequestType.UTILITY, utility("headway_pop_report", "r"))
    assert engine.called == ["answered"]
    assert not engine.has_work()


def test_other_calls_are_refused_as_ever():
    engine = Engine()
    engine.receive(EngineCoreRequestType.UTILITY, utility("save_model"))
    engine.receive(EngineCoreRequestType.UTILITY, utility("headway_statistics"))
    assert engine.called == ["Server shutting down", "answered"]


def test_an_engine_that_aborts_or_runs_does_not_wait():
    engine = Engine(shutdown_timeout=0)
    steered(engine)
    assert not engine.has_work()
    engine = Engine()
    steered(engine)
    engine.shutdown_state = EngineShutdownState.RUNNING
    assert not engine.has_work()


def test_unsteered_requests_owe_nothing():
    engine = Engine()
    engine.shutdown_state = EngineShutdownState.RUNNING
    params = SimpleNamespace(extra_args=None)
    engine.receive(EngineCoreRequestType.ADD, (SimpleNamespace(sampling_params=params), 0))
    engine.shutdown_state = EngineShutdownState.SHUTTING_DOWN
    assert not engine.has_work()


def test_installing_twice_changes_nothing():
    before = EngineCoreProc._handle_client_request
    drain.install()
    assert EngineCoreProc._handle_client_request is before
