"""The requests of `headway bench sgrs`, and what answers must say of how they were served."""

from __future__ import annotations

from typing import Any

import pytest

from headway.benchmarks.completions import Completion
from headway.benchmarks.quality.client import UnsteeredAnswer
from headway.benchmarks.sgrs_load import (
    ARMS,
    BATCH,
    READ,
    SGRS,
    SGRS_BATCH,
    UNSTEERED,
    Arm,
    Judged,
    Requests,
    check,
    draws_per_token,
    prompts,
)
from headway.server.models.smollm2 import ensure_smollm2
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.program import Readout, SamplingGate

pytestmark = pytest.mark.unit

SMOLLM2 = ModelGeometry(30, 9, 3, 64, 576)


def test_what_the_arms_ask_for() -> None:
    for arm in (SGRS, SGRS_BATCH):
        program = compile_spec(parse_spec(arm.steering), SMOLLM2)
        assert program.sampling_gate == SamplingGate(0.6, 5, 3, 5)
        assert program.saliency is not None and program.saliency.layers == (6, 7, 8)
    read = compile_spec(parse_spec(READ.steering), SMOLLM2)
    assert read.sampling_gate is None and Readout.SALIENCY in read.readouts
    assert {each.num_requests for each in ARMS} == {1, BATCH}


def test_prompts_are_prose_of_one_length() -> None:
    found = prompts(ensure_smollm2(), 584, seed=0)
    assert len(found) == BATCH and {len(each) for each in found} == {584}
    assert len({tuple(each) for each in found}) == BATCH
    assert found == prompts(ensure_smollm2(), 584, seed=0)
    assert found != prompts(ensure_smollm2(), 584, seed=1)


def gated(draws: int, **fields: Any) -> dict[str, Any]:
    return {"methods": [{"method": "sgrs", "draws": draws, "layers": [6, 7, 8]}], **fields}


@pytest.mark.parametrize(
    ("arm", "steering", "message"),
    [
        (UNSTEERED, None, None),
        (UNSTEERED, gated(2), "was steered"),
        (SGRS, gated(2), None),
        (SGRS, gated(1), "1 candidates drawn for 2 tokens"),
        (SGRS, None, "0 candidates"),
        (READ, {"saliency": [[{}, {}]]}, None),
        (READ, {"saliency": [[{}]]}, "not every one of 2"),
        (READ, None, "not every one of 2"),
    ],
)
def test_what_answers_must_say(
    arm: Arm, steering: dict[str, Any] | None, message: str | None
) -> None:
    answer = Completion([5, 6], 1, 0.1, steering)
    if message is None:
        check(arm, answer)
        return
    with pytest.raises(UnsteeredAnswer, match=message):
        check(arm, answer)


def test_draws_are_counted_over_all_tokens() -> None:
    answers = [Completion([1] * 4, 1, 1.0, gated(5)), Completion([1] * 4, 1, 1.0, gated(7))]
    assert draws_per_token(answers) == 1.5


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """Of mean context 20, 8 tokens each; its bodies are answered by counting from 40."""

    def answered(url: str, bodies: list[dict[str, Any]]) -> list[Completion]:
        ids = list(range(40, 48))
        saliency = [[{"token_id": token, "saliency": token / 100} for token in ids]]
        steering = gated(10, saliency=saliency)
        return [
            Completion(ids, 1, 0.7, steering if "steering" in body else None) for body in bodies
        ]

    monkeypatch.setattr("headway.benchmarks.sgrs_load.complete", answered)
    return Requests("http://nowhere", ensure_smollm2(), 20, 8, seed=0)


def test_the_context_is_as_long_as_it_is_on_average(requests: Requests) -> None:
    assert {len(prompt) for prompt in requests.prompts} == {16}
    judged = requests.judged()
    assert judged == Judged([*requests.prompts[0], 40, 41, 42, 43], 16, 44, [6, 7, 8], 0.44)


def test_requests_of_a_batch_and_of_rounds_differ(requests: Requests) -> None:
    bodies = [requests._body(SGRS_BATCH, index) for index in range(BATCH)]
    assert [body["prompt"] for body in bodies] == requests.prompts
    assert len({body["seed"] for body in bodies}) == BATCH
    assert "steering" not in requests._body(UNSTEERED, 3)
    assert requests._body(SGRS, 3)["prompt"] == requests._body(UNSTEERED, 3)["prompt"]
    assert len(requests.run(SGRS_BATCH, 5)) == BATCH


def test_a_report_of_other_tokens(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    steering = gated(8, saliency=[[{"token_id": 1, "saliency": 0.1}] * 8])
    monkeypatch.setattr(Requests, "run", lambda *_: [Completion([2] * 8, 1, 1.0, steering)])
    with pytest.raises(UnsteeredAnswer, match="other tokens"):
        requests.judged()
