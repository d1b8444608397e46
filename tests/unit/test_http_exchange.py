"""A steered answer is given only if the workers confirm it; every end is counted."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headway.server.engine.report import EngineReport
from headway.server.http import exchange as exchange_module
from headway.server.http import metrics
from headway.server.http import state as state_module
from headway.server.http.carriage import Carriage
from headway.server.http.exchange import Exchange
from headway.server.http.lifetime import Lifetime
from headway.server.http.presets import Preset
from headway.server.http.requests import SteerableChatCompletionRequest
from headway.server.http.state import ReportStore, SteeringState
from headway.steering import EXTRA_ARG, ModelGeometry, Reason, SteeringError
from headway.steering.artifacts import ResidualArtifact

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(4, 4, 2, 64, 256)
STEERED = {"methods": [{"method": "head_ablation", "heads": [[1, 2]]}]}
IDENTITY = {"methods": [{"method": "vhr", "heads": [[1, 2]], "alpha": 1.0}]}
WHOLE = EngineReport(sequences=1, positions_computed=9, positions_edited=9)


class FakeWorkers:
    """Workers that hold one report."""

    def __init__(self, report: EngineReport | Exception | None) -> None:
        self.report = report
        self.asked = 0

    async def pop_report(self, report_id: str) -> EngineReport | None:
        self.asked += 1
        if isinstance(self.report, Exception):
            raise self.report
        return self.report


def make_state(report: EngineReport | Exception | None = None, **config: Any) -> SteeringState:
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    vllm_config = SimpleNamespace(
        speculative_config=config.get("speculative_config"), parallel_config=parallel
    )
    models = SimpleNamespace(is_base_model=lambda name: name == "base", lora_requests={"lora": 1})
    client: Any = FakeWorkers(report)
    return SteeringState(vllm_config, GEOMETRY, client, models)  # type: ignore[arg-type]


def make_exchange(state: SteeringState, steering: Any = STEERED, run: bool = True) -> Exchange:
    body = SteerableChatCompletionRequest(
        messages=[{"role": "user", "content": "hi"}], steering=steering, model="base"
    )
    resolved = state.resolve(body.steering, body.model, body)
    assert resolved is not None
    metadata = SimpleNamespace(request_id="chatcmpl-1", final_usage_info=None)
    store = {"chatcmpl-1": "response", "other": "response"}
    responses = SimpleNamespace(response_store=store, response_store_lock=asyncio.Lock())
    app = SimpleNamespace(state=SimpleNamespace(openai_serving_responses=responses))
    raw: Any = SimpleNamespace(state=SimpleNamespace(request_metadata=metadata), app=app)
    exchange = Exchange(state, resolved, body, raw)
    exchange.open()
    if run:
        params = body.to_sampling_params(4, {})
        assert ((params.extra_args or {}).get(EXTRA_ARG) is exchange.request) == (
            not resolved.program.is_identity
        )
    return exchange


async def test_a_confirmed_answer_shows_what_was_done() -> None:
    state = make_state(WHOLE)
    exchange = make_exchange(state)
    echo = await exchange.complete()
    assert echo is not None
    assert echo["positions_edited"] == echo["positions_computed"] == 9
    assert echo["methods"][0]["method"] == "head_ablation"
    assert echo["fingerprint"] == exchange.headers["x-headway-fingerprint"]
    assert json.loads(state.reports.get("chatcmpl-1") or b"") == echo
    exchange.close("ok")


async def test_a_method_that_changes_nothing_edits_no_position() -> None:
    methods = [*IDENTITY["methods"], *STEERED["methods"]]
    report = EngineReport(1, 9, 9, by_scope={"all": 9})
    exchange = make_exchange(make_state(report), {"methods": methods})
    echo = await exchange.complete()
    exchange.close("ok")
    assert echo is not None
    assert [method["positions_edited"] for method in echo["methods"]] == [0, 9]


async def test_a_program_that_changes_nothing_reaches_no_worker() -> None:
    state = make_state(None)
    exchange = make_exchange(state, IDENTITY)
    echo = await exchange.complete()
    exchange.close("ok")
    assert echo is not None and echo["identity"] is True
    assert state.client.asked == 0  # type: ignore[attr-defined]


async def test_report_none_is_kept_but_not_shown() -> None:
    state = make_state(WHOLE)
    assert await make_exchange(state, {**STEERED, "report": "none"}).complete() is None
    assert state.reports.get("chatcmpl-1") is not None


@pytest.mark.parametrize(
    ("report", "stage", "text", "unsteered"),
    [
        (None, "report", "no report", 1),
        (RuntimeError("engine is gone"), "report", "no report", 1),
        (EngineReport(1, 9, 8, positions_missed=1), "coverage", "1 of 9", 1),
        (EngineReport(1, 9, 8, by_scope={"all": 8}), "coverage", "8 of 9", 1),
        (EngineReport(1, 0, 0), "coverage", "0 of 0", 1),
        (EngineReport(1, 9, 3, "edit", "ValueError: x"), "edit", "ValueError: x", 0),
    ],
    ids=["none", "lost", "partial", "some unseen", "empty", "failed"],
)
async def test_an_unconfirmed_answer_is_withheld(
    report: EngineReport | Exception | None, stage: str, text: str, unsteered: int
) -> None:
    failures = metrics.FAILURES.labels(stage=stage)._value.get()
    counted = metrics.UNSTEERED._value.get()
    exchange = make_exchange(make_state(report))
    with pytest.raises(SteeringError) as caught:
        await exchange.complete()
    assert caught.value.status == 500
    assert caught.value.reason is Reason.STEERING_FAILED
    assert text in caught.value.message
    assert "chatcmpl-1" in caught.value.message
    assert metrics.FAILURES.labels(stage=stage)._value.get() == failures + 1
    assert metrics.UNSTEERED._value.get() == counted + unsteered
    # Nor may vLLM's store of responses give it out.
    responses = exchange.raw_request.app.state.openai_serving_responses
    assert list(responses.response_store) == ["other"]
    metrics.UNSTEERED.reset()


@pytest.mark.parametrize("report", [None, RuntimeError("Server shutting down")])
async def test_an_answer_that_the_end_of_the_server_cuts_off_is_to_be_asked_for_again(
    report: Exception | None,
) -> None:
    counted = metrics.UNSTEERED._value.get()
    state = make_state(report)
    state.lifetime = Lifetime(SimpleNamespace(errored=True))
    with pytest.raises(SteeringError, match="send the request again") as caught:
        await make_exchange(state).complete()
    assert (caught.value.status, caught.value.reason) == (503, Reason.UNAVAILABLE)
    assert metrics.UNSTEERED._value.get() == counted


async def test_a_failure_is_a_failure_also_while_the_server_ends() -> None:
    state = make_state(EngineReport(1, 9, 3, "edit", "ValueError: x"))
    state.lifetime = Lifetime(SimpleNamespace(errored=True))
    with pytest.raises(SteeringError, match="stage edit") as caught:
        await make_exchange(state).complete()
    assert caught.value.status == 500


class Unloadable:
    """Held artefacts that the workers do not take."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def acquire(self, artifacts: Any) -> list[str]:
        raise self.error

    def release(self, digests: Any) -> None:
        assert list(digests) == []


@pytest.mark.parametrize(
    ("error", "ends", "reason", "text"),
    [
        (RuntimeError("/etc/secret"), False, Reason.STEERING_FAILED, "stage load: RuntimeError"),
        (RuntimeError("/etc/secret"), True, Reason.UNAVAILABLE, "send the request again"),
        (SteeringError(Reason.CAPACITY, "full"), False, Reason.CAPACITY, "full"),
    ],
    ids=["raises", "ends", "no room"],
)
async def test_vectors_that_cannot_be_loaded(
    error: Exception, ends: bool, reason: Reason, text: str
) -> None:
    state = make_state(None)
    state.held = Unloadable(error)  # type: ignore[assignment]
    state.lifetime = Lifetime(SimpleNamespace(errored=ends))
    counted = metrics.FAILURES.labels(stage="load")._value.get()
    exchange = make_exchange(state, run=False)
    artifact = ResidualArtifact.constant(np.ones(GEOMETRY.hidden_size, np.float32))
    program = replace(exchange.steering.program, artifacts=(artifact,))
    exchange.steering = replace(exchange.steering, program=program)
    with pytest.raises(SteeringError) as caught:
        await exchange.load()
    exchange.close("failed")
    assert caught.value.reason is reason
    assert text in caught.value.message and "secret" not in caught.value.message
    failed = reason is Reason.STEERING_FAILED
    assert metrics.FAILURES.labels(stage="load")._value.get() == counted + failed


def test_a_spec_that_cannot_be_compiled_tells_nothing_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile_spec(*args: Any) -> Any:
        raise KeyError("/etc/secret")

    monkeypatch.setattr(state_module, "compile_spec", compile_spec)
    counted = metrics.FAILURES.labels(stage="compile")._value.get()
    with pytest.raises(SteeringError, match="stage compile: KeyError") as caught:
        make_state().resolve(FIELD, "base", None)
    assert (caught.value.status, caught.value.reason) == (500, Reason.STEERING_FAILED)
    assert "secret" not in str(caught.value)
    assert metrics.FAILURES.labels(stage="compile")._value.get() == counted + 1


@pytest.mark.parametrize(
    ("report", "expected"),
    [(EngineReport(1, 9, 3, "edit", "x"), True), (WHOLE, False), (None, False)],
)
async def test_an_engine_error_is_ours_only_if_the_workers_say_so(
    report: EngineReport | None, expected: bool
) -> None:
    failure = await make_exchange(make_state(report)).recorded_failure()
    assert (failure is not None) is expected


async def test_the_workers_are_not_asked_for_what_never_ran() -> None:
    state = make_state(WHOLE)
    exchange = make_exchange(state, run=False)
    assert await exchange.recorded_failure() is None
    exchange.close("error")
    assert state.client.asked == 0  # type: ignore[attr-defined]


async def test_an_abandoned_report_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "DISCARD_SECONDS", 0.0)
    state = make_state(WHOLE)
    make_exchange(state).close("cancelled")
    await asyncio.sleep(0.01)
    assert state.client.asked == 1  # type: ignore[attr-defined]


async def test_only_the_first_end_counts() -> None:
    series = metrics.REQUESTS.labels(method="vhr", outcome="ok")
    active, before = metrics.ACTIVE._value.get(), series._value.get()
    exchange = make_exchange(make_state(), IDENTITY)
    assert metrics.ACTIVE._value.get() == active + 1
    exchange.close("ok")
    exchange.close("cancelled")
    assert metrics.ACTIVE._value.get() == active
    assert series._value.get() == before + 1


def test_reports_are_bounded() -> None:
    store = ReportStore(capacity=2)
    for name in "abc":
        store.put(name, {})
    assert store.get("a") is None
    assert store.get("b") == store.get("c") == b"{}"


FIELD = (Carriage(STEERED, "steering"),)


@pytest.mark.parametrize("name", ["use_beam_search", "background"])
def test_what_decodes_elsewhere_is_refused(name: str) -> None:
    options = SimpleNamespace(**{name: True})
    with pytest.raises(SteeringError) as caught:
        make_state().resolve(FIELD, "base", options)
    assert (caught.value.reason, caught.value.param) == (Reason.UNSUPPORTED, name)


def test_speculative_decoding_is_refused() -> None:
    state = make_state(speculative_config=object())
    assert state.resolve(None, "base", None) is None
    with pytest.raises(SteeringError, match="speculative") as caught:
        state.resolve(FIELD, "base", None)
    assert (caught.value.reason, caught.value.param) == (Reason.UNSUPPORTED, "steering")


@pytest.mark.parametrize("base", ["base", "lora"])
def test_an_alias_resolves_to_its_preset(base: str) -> None:
    state = make_state()
    compiled = state.resolve(FIELD, base, None)
    assert compiled is not None
    state.presets = {"quiet": Preset("quiet", STEERED["methods"], compiled.program)}
    resolved = state.resolve(None, f"{base}:quiet", None)
    assert resolved is not None
    assert (resolved.model, resolved.spec.preset) == (base, "quiet")
    assert resolved.program.fingerprint == compiled.program.fingerprint
    with pytest.raises(SteeringError, match="more than once") as caught:
        state.resolve(FIELD, f"{base}:quiet", None)
    assert caught.value.reason is Reason.CONFLICT
