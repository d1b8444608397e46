"""SGRS from the request to the workers and back to the answer; the engine's part is a fake here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from headway.server.engine.cache_key import cache_keys
from headway.server.engine.config import max_sgrs_requests, refuse_unsupported
from headway.server.engine.gated_request_scheduler import LimitsGatedRequests
from headway.server.engine.report import EngineReport
from headway.server.engine.request import EXTRA_ARG
from headway.server.http import echo
from headway.server.http.exchange import Exchange
from headway.server.http.metrics import SGRS_DRAWS, SGRS_FALLBACKS, SGRS_REFUSALS
from headway.steering import (
    ModelGeometry,
    Reason,
    SteeringError,
    SteeringProgram,
    compile_spec,
    parse_spec,
)
from headway.steering.positions import PromptFacts
from headway.steering.program import QueryScope, Readout, ResidualEdit, SaliencyRule, SamplingGate
from headway.steering.wire import decode_program, encode_program

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(32, 4, 2, 8, 32)
WITH_IMAGES = ModelGeometry(32, 4, 2, 8, 32, supports_images=True)
FACTS = PromptFacts(40)
VHR = {"method": "vhr", "heads": [[0, 0]]}
READ = {"report": {"saliency": True}}


def sgrs(**options: Any) -> dict[str, Any]:
    return {"method": "sgrs", **options}


def program(*methods: dict, geometry: ModelGeometry = GEOMETRY, **spec: Any) -> SteeringProgram:
    body = {**spec, **({"methods": list(methods)} if methods else {})}
    return compile_spec(parse_spec(body), geometry)


UNSTEERED = program({**VHR, "alpha": 1.0})


def test_the_defaults_are_those_of_the_paper_s_code() -> None:
    gated = program(sgrs())
    assert gated.saliency == SaliencyRule((6, 7, 8), QueryScope.OUTPUT)
    assert gated.sampling_gate == SamplingGate(0.6, 5, 3, 5)
    assert not gated.is_identity and gated.fingerprint != UNSTEERED.fingerprint
    assert gated.readouts == ()


@pytest.mark.parametrize(("layers", "expected"), [(30, (6, 7, 8)), (4, (1,)), (1, (0,))])
def test_default_layers_are_scaled_to_depth(layers: int, expected: tuple[int, ...]) -> None:
    gated = program(sgrs(), geometry=ModelGeometry(layers, 4, 2, 8, 32))
    assert gated.saliency is not None and gated.saliency.layers == expected


def test_alpha_zero_refuses_nobody_and_is_an_unsteered_request() -> None:
    open_gate = program(sgrs(alpha=0.0))
    assert open_gate.is_identity and open_gate.fingerprint == UNSTEERED.fingerprint
    read = program(sgrs(alpha=0.0, layers=[3]), **READ)
    assert read.sampling_gate is None and read.saliency == SaliencyRule((3,))


@pytest.mark.parametrize(
    ("options", "reason", "param"),
    [
        ({"alpha": -0.1}, Reason.BAD_PARAM, "alpha"),
        ({"top_k": 0}, Reason.BAD_PARAM, "top_k"),
        ({"top_k": 33}, Reason.BAD_PARAM, "top_k"),
        ({"window": 65}, Reason.BAD_PARAM, "window"),
        ({"top_k": 2, "max_resample": 3}, Reason.BAD_PARAM, "max_resample"),
        ({"layers": [32]}, Reason.LAYER_RANGE, "layers[0]"),
        ({"layers": []}, Reason.BAD_PARAM, "layers"),
        ({"history": "all"}, Reason.BAD_PARAM, "history"),
        ({"history": "after_image"}, Reason.NO_IMAGE, "history"),
        ({"norm": "none"}, Reason.BAD_PARAM, "norm"),
    ],
)
def test_wrong_options_are_refused(options: dict, reason: Reason, param: str) -> None:
    with pytest.raises(SteeringError) as caught:
        program(sgrs(**options))
    assert caught.value.reason is reason
    assert caught.value.param == f"steering.methods[0].{param}"


def test_the_default_number_of_draws_is_no_more_than_the_candidates() -> None:
    gate = program(sgrs(top_k=2)).sampling_gate
    assert gate is not None and gate.max_resample == 2


def test_history_after_the_image_needs_one() -> None:
    gated = program(sgrs(history="after_image"), geometry=WITH_IMAGES)
    assert gated.image_param == "steering.methods[0]"
    assert gated.saliency is not None and gated.saliency.history is QueryScope.AFTER_IMAGE


def test_two_gates_conflict_even_where_one_is_open() -> None:
    with pytest.raises(SteeringError, match=r"methods\[0\]") as caught:
        program(sgrs(), sgrs(alpha=0.0))
    assert (caught.value.reason, caught.value.param) == (Reason.CONFLICT, "steering.methods[1]")


def test_saliencies_may_be_all_that_is_asked_for() -> None:
    read = program(**READ)
    assert read.saliency == SaliencyRule((6, 7, 8)) and read.sampling_gate is None
    assert read.readouts == (Readout.SALIENCY,)
    assert not read.is_identity and read.fingerprint == UNSTEERED.fingerprint
    assert cache_keys(read, FACTS, "") == []


@pytest.mark.parametrize(
    ("report", "param"),
    [
        ({"report": "full"}, "steering"),
        ({"report": {"saliency": False}}, "steering"),
        ({"report": {"level": "all", "saliency": True}}, "steering.report.level"),
        ({"report": {"salience": True}}, "steering.report.salience"),
        ({"report": 5}, "steering.report"),
    ],
)
def test_other_requests_without_methods_are_refused(report: dict, param: str) -> None:
    with pytest.raises(SteeringError) as caught:
        program(**report)
    assert (caught.value.reason, caught.value.param) == (Reason.BAD_PARAM, param)


def test_what_a_full_report_reads() -> None:
    assert program(sgrs(), report="full").readouts == (Readout.SALIENCY,)
    assert program(sgrs(), report={"level": "summary"}).readouts == ()
    assert program(VHR, report="full").readouts == ()


def test_the_wire_keeps_gate_and_saliency() -> None:
    sent = program(sgrs(layers=[9, 2], alpha=0.9), report="full")
    got = decode_program(encode_program(sent), GEOMETRY)
    assert got.saliency == sent.saliency == SaliencyRule((2, 9))
    assert (got.sampling_gate, got.readouts) == (sent.sampling_gate, sent.readouts)
    assert got.fingerprint == sent.fingerprint


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("saliency", {"layers": [32]}),
        ("saliency", {"layers": []}),
        ("saliency", {"layers": [2, 2]}),
        ("saliency", {"history": "all"}),
        ("sampling_gate", {"alpha": float("nan")}),
        ("sampling_gate", {"top_k": 0}),
        ("sampling_gate", {"window": 0}),
    ],
)
def test_values_that_do_not_fit_are_refused_by_the_workers(part: str, changes: dict) -> None:
    wire = encode_program(program(sgrs()))
    wire[part] = {**wire[part], **changes}
    with pytest.raises(ValueError, match="salien|gate"):
        decode_program(wire, GEOMETRY)


def test_a_gate_without_a_saliency_is_refused_by_the_workers() -> None:
    with pytest.raises(ValueError, match="does not say which"):
        decode_program({**encode_program(program(sgrs())), "saliency": None}, GEOMETRY)


def test_a_gate_shares_its_blocks_with_those_it_computes_alike() -> None:
    assert cache_keys(program(sgrs()), FACTS, "") == []
    assert cache_keys(program(sgrs(), VHR), FACTS, "") == cache_keys(program(VHR), FACTS, "") != []


def echo_of(steered: SteeringProgram, report: EngineReport | None, **options: Any) -> dict:
    spec = parse_spec({"methods": [VHR], **options})
    steering: Any = SimpleNamespace(spec=spec, program=steered)
    return echo.echo_of(steering, report, {})


def counted(*tokens: list, draws: int = 0, refusals: int = 0, fallbacks: int = 0) -> dict:
    counts = {"draws": draws, "refusals": refusals, "fallbacks": fallbacks}
    return {**counts, "tokens": list(tokens)}


def test_the_answer_counts_over_the_sequences() -> None:
    first = counted([40, 7, None, None, 1, 0, 0], [41, 8, 0.2, 0.3, 3, 3, 1], draws=4, refusals=3)
    report = EngineReport(2, 9, saliency=[first, counted(draws=2, fallbacks=1)])
    echo = echo_of(program(sgrs(), report="full"), report)
    (method,) = echo["methods"]
    assert (method["draws"], method["refusals"], method["fallbacks"]) == (6, 3, 1)
    assert "positions_edited" not in method
    assert echo["saliency"][0][1] == {
        "position": 41, "token_id": 8, "saliency": 0.2, "threshold": 0.3,
        "draws": 3, "refusals": 3, "fallback": True,
    }  # fmt: skip
    assert echo["saliency"][1] == []
    assert "saliency" not in echo_of(program(sgrs()), report)


def test_without_a_gate_only_saliencies_are_shown() -> None:
    report = EngineReport(1, 9, saliency=[counted([40, 7, 0.5, None, 0, 0, 0])])
    echo = echo_of(program(**READ), report)
    assert echo["saliency"] == [[{"position": 40, "token_id": 7, "saliency": 0.5}]]
    assert echo["methods"] == []


async def test_metrics_count_a_report_once() -> None:
    reports: list[Any] = [EngineReport(1, 9, saliency=[counted(draws=5, refusals=2, fallbacks=1)])]

    async def pop_report(name: str) -> Any:
        return reports.pop() if reports else None

    counters = (SGRS_DRAWS, SGRS_REFUSALS, SGRS_FALLBACKS)
    before = [each._value.get() for each in counters]
    state: Any = SimpleNamespace(client=SimpleNamespace(pop_report=pop_report))
    steering: Any = SimpleNamespace(program=program(sgrs()))
    body: Any = SimpleNamespace(carry=lambda request: None)
    exchange = Exchange(state, steering, body, None)  # type: ignore[arg-type]
    await exchange._pop_report()
    await exchange._pop_report()
    after = [each._value.get() for each in counters]
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, 2, 1]


def test_reports_of_several_engines_are_put_together() -> None:
    one, two = EngineReport(1, saliency=[counted(draws=1)]), EngineReport(1, saliency=[counted()])
    assert one.merge(two).saliency == [counted(draws=1), counted()]


def engine(**changes: Any) -> Any:
    model = {"quantization": None, "architecture": "A", "model_type": "llama", "sizes": {}}
    values = {**model, "settings": {}, "v2": False, **changes}
    return SimpleNamespace(
        additional_config={"headway": values["settings"]},
        model_config=SimpleNamespace(
            quantization=values["quantization"],
            architecture=values["architecture"],
            hf_text_config=SimpleNamespace(model_type=values["model_type"]),
            get_total_num_hidden_layers=lambda: 4,
        ),
        parallel_config=SimpleNamespace(**values["sizes"]),
        use_v2_model_runner=values["v2"],
    )


@pytest.mark.parametrize("steered", [program(sgrs()), program(**READ)], ids=["gate", "readout"])
@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"sizes": {"tensor_parallel_size": 2}}, Reason.UNSUPPORTED, "one rank"),
        ({"sizes": {"pipeline_parallel_size": 2}}, Reason.UNSUPPORTED, "one rank"),
        ({"quantization": "awq"}, Reason.QUANTIZED, "awq"),
        ({"v2": True}, Reason.UNSUPPORTED, "V2"),
        ({"settings": {"max_sgrs_requests": 0}}, Reason.UNSUPPORTED, "--max-sgrs-requests"),
        ({"model_type": "mamba"}, Reason.UNSUPPORTED, "mamba"),
    ],
)
def test_engines_that_cannot_refuse(
    steered: SteeringProgram, changes: dict, reason: Reason, text: str
) -> None:
    refuse_unsupported(steered, engine())
    with pytest.raises(SteeringError, match=text) as caught:
        refuse_unsupported(steered, engine(**changes))
    assert caught.value.reason is reason


def test_queries_scaled_by_position_are_refused() -> None:
    other = engine(model_type="mistral")
    other.model_config.hf_text_config.llama_4_scaling = {"beta": 0.1}
    with pytest.raises(SteeringError, match="llama_4_scaling"):
        refuse_unsupported(program(sgrs()), other)


def test_edits_that_the_pass_does_not_go_back_through_are_refused() -> None:
    edited = replace(program(sgrs()), residual_edits=(ResidualEdit(1, "0" * 64, 1.0),))
    with pytest.raises(SteeringError, match="residual stream") as caught:
        refuse_unsupported(edited, engine())
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize("number", [-1, True, "8", 1.5])
def test_a_limit_that_is_no_number_ends_the_start(number: Any) -> None:
    with pytest.raises(ValueError, match="max_sgrs_requests"):
        max_sgrs_requests(engine(settings={"max_sgrs_requests": number}))


class OtherScheduler:
    """As much of vLLM's as the limit needs: each step starts whoever may start, in order."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.requests: dict[str, Request] = {}

    def add_request(self, request: Request) -> None:
        self.requests[request.request_id] = request

    def schedule(self) -> None:
        for each in self.requests.values():
            waits = each.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            if waits and self._handle_blocked_waiting_request(each):
                each.status = RequestStatus.RUNNING

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return True


class Limited(LimitsGatedRequests, OtherScheduler):
    pass


def queued(name: str, steered: SteeringProgram | None) -> Request:
    params = SamplingParams(max_tokens=3)
    params.extra_args = {EXTRA_ARG: encode_program(steered)} if steered else None
    return Request(name, [1, 2], params, None)


def running(scheduler: Any) -> str:
    scheduler.schedule()
    states = scheduler.requests.values()
    return "".join(each.request_id for each in states if each.status == RequestStatus.RUNNING)


def test_those_beyond_the_limit_wait_and_nobody_else() -> None:
    scheduler = Limited(engine(settings={"max_sgrs_requests": 2}))
    for name, steered in (("a", program(sgrs())), ("b", program(**READ)), ("c", program(sgrs()))):
        scheduler.add_request(queued(name, steered))
    scheduler.add_request(queued("x", None))
    scheduler.add_request(queued("y", program(VHR)))
    assert running(scheduler) == "abxy"
    scheduler.requests["a"].status = RequestStatus.FINISHED_STOPPED
    assert running(scheduler) == "bcxy"


def test_a_preempted_request_keeps_its_place() -> None:
    scheduler = Limited(engine(settings={"max_sgrs_requests": 1}))
    for name in "ab":
        scheduler.add_request(queued(name, program(sgrs())))
    assert running(scheduler) == "a"
    first = scheduler.requests.pop("a")
    first.status = RequestStatus.PREEMPTED
    assert running(scheduler) == ""  # b may not come in between
    scheduler.requests["a"] = first  # behind b
    assert running(scheduler) == "a"
