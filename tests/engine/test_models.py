"""Classes of image models in the real engine: tiny random checkpoints against transformers.

LLaVA-1.5 has the session's engine, which test_var.py and others use; the others have one each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headway.server.engine import layer_boundary
from headway.server.engine.attention import decoder_layers, layer_index
from headway.server.engine.geometry import facts_of, geometry_of
from headway.steering import EXTRA_ARG, SteeringError, SteeringProgram
from headway.steering.positions import PromptFacts, Range
from headway.steering.sinks import known_sink_dims
from headway.steering.wire import decode_facts
from tests.attention_oracle import Locore, Scale
from tests.engine.conftest import start
from tests.engine.harness import Harness
from tests.engine.saliency_watch import watched_saliencies, worst_error
from tests.engine.served_models import ALPHA, MAX_TOKENS, VAR_LAYERS, VHR_HEADS, Question, Served
from tests.sgrs_oracle import text_after_image
from tests.tiny_models.base import SINK_DIMS, TinyModel
from tests.tiny_models.internvl import INTERNVL
from tests.tiny_models.internvl_chat import INTERNVL_CHAT
from tests.tiny_models.llava import LLAVA
from tests.tiny_models.llava_next import LLAVA_NEXT
from tests.tiny_models.qwen_vl import QWEN2_5_VL, QWEN2_VL

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KEPT: list[Harness] = []
"""Engines that were started here."""

MODELS = [LLAVA, LLAVA_NEXT, QWEN2_VL, QWEN2_5_VL, INTERNVL, INTERNVL_CHAT]
TOLERANCE = 1e-3

VICUNA = {"hidden_size": 4096, "num_layers": 32, "num_kv_heads": 32, "vocab_size": 32064}
VICUNA["max_position_embeddings"] = 4096
QWEN2 = {"hidden_size": 3584, "num_layers": 28}
PUBLISHED: dict[str, tuple[dict[str, int], tuple[int, ...] | None]] = {
    "llava": (VICUNA, (1415, 2533)),
    "llava-next": (VICUNA, None),  # with a Mistral
    "qwen2-vl": (QWEN2, (458, 2570)),
    "qwen2.5-vl": (QWEN2, None),
    "internvl": (QWEN2, None),  # with a Qwen2
    "internvl-chat": ({"hidden_size": 4096, "num_layers": 32}, (3584,)),
}
"""Sizes of a 7B or 8B model, and the dimensions that VAR's authors give for it."""


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def served(request, tmp_path_factory):
    model: TinyModel = request.param
    if model is LLAVA:
        folder = request.getfixturevalue("llava_folder")
        yield Served(model, request.getfixturevalue("llava"), folder, model.build(folder))
        return
    folder = tmp_path_factory.mktemp(model.name)
    reference = model.build(folder)
    harness = start(
        folder,
        max_model_len=256,
        max_num_batched_tokens=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 25,
        limit_mm_per_prompt={"image": 2, "video": 0},
    )
    # An engine that goes away takes along the process groups that all engines here share.
    KEPT.append(harness)
    yield Served(model, harness, folder, reference)


def context_of(harness: Harness) -> dict[str, Any]:
    context: dict[str, Any] = harness.runner.vllm_config.compilation_config.static_forward_context
    return context


def test_sizes_are_the_language_models(served):
    assert geometry_of(served.harness.runner.vllm_config) == served.model.geometry


def test_families_with_known_sinks_are_recognised(served):
    """By what vLLM reads from the configuration, at the sizes of published checkpoints."""
    model = served.harness.runner.vllm_config.model_config
    sizes, dims = PUBLISHED[served.model.name]
    facts = replace(facts_of(model, served.model.geometry), **sizes)
    assert known_sink_dims(facts) == dims


def test_decoder_layers_are_hooked_and_numbered(served):
    """All of the decoder's layers, in order, and nothing of the vision tower."""
    harness, count = served.harness, served.model.geometry.num_layers
    layers = decoder_layers(context_of(harness), harness.runner.model)
    assert [layer_index(name) for name in layers] == list(range(count))
    modules = harness.runner.model.named_modules()
    hooked = [name for name, each in modules if each in layer_boundary._HOOKED]
    # InternLM2's layers call the norm before their MLP by another name, and refuse edits there.
    inner = ["", ".post_attention_layernorm"]
    if "internlm2" in type(harness.runner.model.language_model).__name__.lower():
        inner = [""]
    path = "language_model.model"
    names = [f"{path}.layers.{index}{part}" for index in range(count) for part in inner]
    assert hooked == [*names, f"{path}.norm"]


def sent_facts(served: Served, question: Question, monkeypatch) -> tuple[list[int], PromptFacts]:
    """The prompt as the engine expands it, and what the worker is told of it."""
    sent: list[Any] = []
    core = served.harness.llm.llm_engine.engine_core
    original = core.add_request
    with monkeypatch.context() as patch:
        patch.setattr(core, "add_request", lambda each: (sent.append(each), original(each)))
        served.harness.run([question.job(served.program(served.vhr()))])
    (request,) = sent
    payload = request.sampling_params.extra_args[EXTRA_ARG]
    return request.prompt_token_ids, decode_facts(payload["facts"])


def ranges(flags: torch.Tensor) -> tuple[Range, ...]:
    """The runs of True."""
    edges = torch.diff(flags.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()
    return tuple((int(start), int(stop)) for start, stop in edges.view(-1, 2))


def test_image_tokens_are_those_of_the_embeddings(served, monkeypatch):
    """No separator among them, and one span a picture."""
    for question in served.questions:
        expanded, facts = sent_facts(served, question, monkeypatch)
        assert expanded == question.ids
        assert facts.prompt_len == len(question.ids)
        expected = ranges(question.image_mask(0))
        assert facts.image_tokens == facts.image_spans == expected
        counts = [served.model.picture_tokens[kind] for kind in question.kinds]
        assert [stop - start for start, stop in expected] == counts


def test_unsteered_answers_are_those_of_transformers(served):
    asked = served.questions
    results = served.harness.run([question.job() for question in asked])
    assert [result.tokens for result in results] == served.reference
    worst = served.difference([question.job() for question in asked], [[], []], asked)
    print(f"{served.model.name}: largest difference of a logit, unsteered: {worst:.2e}")
    assert worst <= TOLERANCE


def test_steered_answers_are_those_of_the_oracle(served):
    """VHR, VAR, both with LocoRE, and nothing, in one batch."""
    one, two = served.questions
    heads = {tuple(pair) for pair in VHR_HEADS}
    locore = {"method": "locore", "beta": 1.0, "layers": [0], "history": "any"}
    cases: list[tuple[Question, SteeringProgram | None, list[Any]]] = [
        (one, served.program(served.vhr()), [Scale(heads, ALPHA)]),
        (two, served.program(served.vhr()), [Scale(heads, ALPHA)]),
        (one, served.program(served.var()), [one.var()]),
        (two, served.program(served.var()), [two.var()]),
        (
            two,
            served.program(served.var(), locore, served.vhr()),
            [
                two.var(),
                Locore(len(two.ids), 1.0, layers=[0], any_history=True),
                Scale(heads, ALPHA),
            ],
        ),
        (one, None, []),
    ]
    asked, programs, edits = (list(column) for column in zip(*cases, strict=True))
    jobs = [question.job(each) for question, each in zip(asked, programs, strict=True)]
    worst = served.difference(jobs, edits, asked)
    print(f"{served.model.name}: largest difference of a logit, steered: {worst:.2e}")
    assert worst <= TOLERANCE
    for job, (edit, *_) in zip(jobs[2:5], edits[2:5], strict=True):
        readings = served.harness.runner.steering.pop_report(job.request.report_id).readings
        assert (readings["considered"], readings["met"]) == (edit.considered, edit.met)


def test_heads_chosen_by_the_prompt_are_those_of_the_rule(served):
    """VHR on its own: the text pass, then the choice at every layer, and the answer with it."""
    layers = list(range(served.model.geometry.num_layers))
    method = {"method": "vhr", "alpha": ALPHA, "layers": layers}
    jobs = [question.job(served.program(method)) for question in served.questions]
    choices = [served.choices(question, layers) for question in served.questions]
    assert all(choice.margin > 1e-4 for each in choices for choice in each)  # no tie
    chosen = [[(layer, head) for layer in layers for head in each[layer].heads] for each in choices]
    edits = [[Scale(heads, ALPHA)] for heads in chosen]
    worst = served.difference(jobs, edits, served.questions)
    print(f"{served.model.name}: largest difference of a logit, chosen heads: {worst:.2e}")
    assert worst <= TOLERANCE
    for job, heads in zip(jobs, chosen, strict=True):
        report = served.harness.runner.steering.pop_report(job.request.report_id)
        assert [tuple(head) for head in report.heads] == heads


def test_saliencies_are_those_of_autograd(served):
    """SGRS on both questions, with M-RoPE where there is; refused where the layers are others."""
    layers = [0, 2]
    steered = served.program({"method": "sgrs", "layers": layers, "history": "after_image"})
    jobs = [question.job(steered) for question in served.questions]
    if served.model.name == "internvl-chat":
        with pytest.raises(SteeringError, match="internlm2"):
            served.harness.run(jobs)
        return
    with watched_saliencies() as seen:
        results = served.harness.run(jobs)
    worst = 0.0
    for job, question, result in zip(jobs, served.questions, results, strict=True):
        own = [each for each in seen if each.job == job.name]
        assert len({each.position for each in own}) == MAX_TOKENS
        ids = question.ids + result.tokens
        history = text_after_image(ids, served.model.embedding_id)
        for each in own[:3]:
            further = each.position + 1 - len(question.ids)
            inputs = question.oracle_inputs(further)
            model = served.oracle.model
            error = worst_error(model, job, ids, history, layers, [each], **inputs)
            worst = max(worst, error)
    print(f"{served.model.name}: largest relative error of a saliency: {worst:.2e}")
    assert worst <= TOLERANCE


def test_the_cases_tell_right_from_wrong(served):
    """Some image tokens are sinks, some rows meet the conditions, and all of it matters."""
    oracle, tau = served.oracle, served.model.tau
    for question in served.questions:
        ids, inputs = question.ids + [5] * (MAX_TOKENS - 1), question.oracle_inputs(MAX_TOKENS - 1)
        plain = oracle.logits(ids, **inputs)[-1]

        def moved(plain=plain, ids=ids, edits=(), **inputs: Any) -> float:
            return float((oracle.logits(ids, edits, **inputs)[-1] - plain).abs().max())

        image = question.image_mask(MAX_TOKENS - 1)
        for layer in VAR_LAYERS:
            stream = oracle.streams[layer]
            phi = stream[:, SINK_DIMS].abs().amax(-1) / stream.pow(2).mean(-1).sqrt()
            assert 0 < (phi[image] >= tau).sum() < image.sum()
            assert (phi[: len(question.ids)] - tau).abs().min() > 1e-3  # no tie
        edit = question.var()
        assert moved(edits=[edit], **inputs) > 10 * TOLERANCE
        assert 0 < edit.met < edit.considered
        for head in VHR_HEADS:
            assert moved(edits=[Scale({tuple(head)}, ALPHA)], **inputs) > 10 * TOLERANCE
        black = {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert moved(**inputs | black) > 10 * TOLERANCE
        if "mm_token_type_ids" in inputs:  # with positions of one dimension
            as_text = {"mm_token_type_ids": torch.zeros_like(inputs["mm_token_type_ids"])}
            assert moved(**inputs | as_text) > 10 * TOLERANCE


def test_identity_edits_are_the_unsteered_answer(served):
    for methods in ([served.vhr(1.0)], [served.var(0.0)]):
        question = served.questions[1]
        jobs = [question.job(served.program(*methods)), question.job()]
        steered, plain = served.harness.run(jobs)
        assert (steered.tokens, steered.logprobs) == (plain.tokens, plain.logprobs)
