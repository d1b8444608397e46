"""Steering through `vllm.LLM` without HTTP, and what is refused on that way."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from headway.server.engine.geometry import geometry_of
from headway.steering import EXTRA_ARG, SteeringError, sampling_params
from tests.engine.harness import GEOMETRY, Job, program

pytestmark = pytest.mark.engine

METHODS = [{"method": "head_ablation", "heads": [[10, head] for head in range(9)]}]


def generate(harness, prompt, params) -> list[int]:
    (output,) = harness.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, **options)


def test_a_spec_steers_like_a_compiled_program(harness, prompts):
    plain = generate(harness, prompts[1], greedy())
    steered = generate(harness, prompts[1], sampling_params(greedy(), {"methods": METHODS}))
    assert steered == harness.run([Job(prompts[1], program(*METHODS))])[0].tokens
    assert steered != plain


def test_chat_steers_too(harness):
    messages = [{"role": "user", "content": "Write one sentence about the sea."}]
    steered = sampling_params(greedy(), {"methods": METHODS})
    texts = [
        harness.llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text
        for params in (greedy(), steered, greedy())
    ]
    assert texts[0] == texts[2] != texts[1]


def test_several_sequences_of_one_request_are_all_steered(harness, prompts):
    harness.runner.steering.reports.clear()
    params = SamplingParams(temperature=0.8, seed=3, n=3, max_tokens=6, ignore_eos=True)
    steered = sampling_params(params, {"methods": METHODS})
    (output,) = harness.llm.generate({"prompt_token_ids": prompts[2]}, steered, use_tqdm=False)
    (report,) = harness.runner.steering.reports.values()
    assert len(output.outputs) == report.sequences == 3
    assert report.is_complete


def test_the_callers_parameters_are_left_alone():
    params = greedy(extra_args={"other": 1})
    steered = sampling_params(params, {"methods": METHODS})
    assert params.extra_args == {"other": 1}
    assert steered.extra_args["other"] == 1
    with pytest.raises(SteeringError, match="already steered"):
        sampling_params(steered, {"methods": METHODS})


def test_zero_strength_is_an_unsteered_request(harness, prompts):
    harness.forget_cache()
    zero = {"methods": [{"method": "vhr", "heads": [[3, 1]], "alpha": 1.0}]}
    prompt = prompts[9] * 2
    plain = generate(harness, prompt, greedy())
    params = sampling_params(greedy(), zero)
    (output,) = harness.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == plain
    assert output.num_cached_tokens > 0  # it even shares the cache of unsteered requests


BAD = {
    "layer": ({"methods": [{"method": "vhr", "heads": [[30, 0]]}]}, "0 .. 29"),
    "preset": ({"preset": "nonesuch"}, "no preset"),
}


@pytest.mark.parametrize("case", BAD)
def test_specs_that_do_not_fit_the_model_raise_and_the_engine_lives(harness, prompts, case):
    spec, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        generate(harness, prompts[0], sampling_params(greedy(), spec))
    assert len(generate(harness, prompts[0], greedy())) == 8


@pytest.mark.parametrize(
    "extra_args",
    [
        {EXTRA_ARG: {"fingerprint": "0" * 64, "head_edits": []}},
        {EXTRA_ARG: "vhr"},
        {"steering": '{"methods": []}'},
    ],
)
def test_forged_or_unread_steering_is_refused(harness, prompts, extra_args):
    with pytest.raises(ValueError, match="steer"):
        generate(harness, prompts[0], greedy(extra_args=extra_args))


def test_an_engine_without_headway_refuses_to_ignore_steering(harness, prompts, monkeypatch):
    monkeypatch.setattr(harness.llm.llm_engine.vllm_config, "additional_config", {})
    with pytest.raises(ValueError, match="without"):
        generate(harness, prompts[0], sampling_params(greedy(), {"methods": METHODS}))


def test_speculative_decoding_is_refused(harness, prompts, monkeypatch):
    monkeypatch.setattr(harness.llm.llm_engine.vllm_config, "speculative_config", object())
    with pytest.raises(ValueError, match="speculative"):
        generate(harness, prompts[0], sampling_params(greedy(), {"methods": METHODS}))


def test_geometry_is_read_from_the_model(harness):
    assert geometry_of(harness.llm.llm_engine.vllm_config) == GEOMETRY
