"""VAR in the real engine against edited attention matrices: images, sinks, both kinds of rows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor

from headway.steering import ModelGeometry, SteeringError, SteeringProgram
from headway.steering.head_words import HeadField, HeadWords, KeyClass, KeyTag
from headway.steering.program import HeadEdit, SinkRule
from headway.steering.spans import parse_span
from tests.attention_oracle import Move, Scale, Var
from tests.engine.harness import GEOMETRY, Job, largest_difference, program
from tests.engine.offline import run_offline
from tests.tiny_llava import IMAGE_TOKEN, SINK_DIMS, TAU, TOKENS_PER_IMAGE, picture

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
MAX_TOKENS = 8
LLAVA = ModelGeometry(4, 8, 4, 32, 256, supports_images=True)
BASE = {"method": "var", "sink_dims": SINK_DIMS, "tau": TAU}

QUESTIONS = [
    "<image>What is on this picture?",
    "Look at this picture, all of it: <image>Is there a circle, or is there none?",
    "<image>and then<image>Which of the two is brighter?",
    "Compare <image> with <image>.",
]


@pytest.fixture(scope="module")
def processor(llava_folder):
    return AutoProcessor.from_pretrained(llava_folder)


class Question:
    """A prompt with its images, as the engine takes it and as it expands it."""

    def __init__(self, processor, index: int) -> None:
        text = f"<|im_start|>user\n{QUESTIONS[index]}<|im_end|>\n<|im_start|>assistant\n"
        self.images = [picture(10 * index + at) for at in range(text.count("<image>"))]
        self.short = processor.tokenizer(text)["input_ids"]
        inputs = processor(images=self.images, text=text, return_tensors="pt")
        self.ids = inputs["input_ids"][0].tolist()
        self.pixels = {"pixel_values": inputs["pixel_values"]}
        assert self.ids.count(IMAGE_TOKEN) == TOKENS_PER_IMAGE * len(self.images)

    def job(self, steered: SteeringProgram | None, max_tokens: int = MAX_TOKENS) -> Job:
        return Job(self.short, steered, max_tokens, images=self.images)

    def image_mask(self, further: int) -> torch.Tensor:
        return torch.tensor([token == IMAGE_TOKEN for token in self.ids] + [False] * further)

    def edit(self, **options) -> Var:
        options = {"layers": [2], "sink_dims": SINK_DIMS, "tau": TAU} | options
        return Var(self.image_mask(MAX_TOKENS - 1), len(self.ids), **options)


@pytest.fixture(scope="module")
def questions(processor) -> list[Question]:
    return [Question(processor, index) for index in range(len(QUESTIONS))]


def var(**options) -> SteeringProgram:
    return program({**BASE, **options}, geometry=LLAVA)


VARIANTS = [
    (var(), {}),
    (var(layers=[1, 2, 3], rho=0.3, p=1.0), {"layers": [1, 2, 3], "rho": 0.3, "p": 1.0}),
    (
        var(compat="reference-code", rho=0.7, p=0.2),
        {"as_code": True, "layers": [2, 3], "rho": 0.7, "p": 0.2},
    ),
    (
        var(layers=[0, 1, 2, 3], min_visual_mass=0.4, rho=0.0),
        {"layers": [0, 1, 2, 3], "min_visual_mass": 0.4, "rho": 0.0},
    ),
]


@pytest.mark.parametrize("turn", range(len(VARIANTS)))
def test_logits_equal_the_oracle(llava, llava_oracle, questions, turn):
    """Every prompt with a variant of its own, beside an unsteered one; every output position."""
    jobs, edits, compared = [], [], []
    for index, question in enumerate(questions):
        steered, options = VARIANTS[(index + turn) % len(VARIANTS)]
        jobs.append(question.job(steered))
        edits.append([question.edit(**options)])
        compared.append(question)
    jobs.append(questions[0].job(None))
    edits.append([])
    compared.append(questions[0])
    worst = largest_difference(
        llava,
        llava_oracle,
        jobs,
        edits,
        prompts=[question.ids for question in compared],
        inputs=[question.pixels for question in compared],
    )
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst <= TOLERANCE
    # The report's image-centric share is the oracle's.
    for job, (edit,) in zip(jobs[:-1], edits[:-1], strict=True):
        readings = llava.runner.steering.pop_report(job.request.report_id).readings
        assert readings["considered"] == edit.considered
        assert readings["met"] == edit.met


def test_the_conditions_are_met_by_some_rows_and_not_by_others(llava_oracle, questions):
    """So that the test above tells a wrong condition from a right one; and the edit matters."""
    for question in questions:
        plain = llava_oracle.logits(question.ids + [5] * 7, **question.pixels)
        for _, options in VARIANTS:
            edit = question.edit(**options)
            steered = llava_oracle.logits(question.ids + [5] * 7, [edit], **question.pixels)
            assert 0 < edit.met <= edit.considered
            assert (steered - plain)[-1].abs().max() > 10 * TOLERANCE
            assert all((sums - 1).abs().max() < 1e-5 for sums in llava_oracle.row_sums)


def first_sink(oracle, question: Question, tokens: list[int], layers: tuple[int, ...]) -> int:
    """Index of the first output token that is a sink of a layer; their number if none is."""
    oracle.logits(question.ids + tokens, **question.pixels)
    sinks = torch.zeros(len(tokens), dtype=torch.bool)
    for layer in layers:
        stream = oracle.streams[layer][-len(tokens) :]
        phi = stream[:, SINK_DIMS].abs().amax(-1) / stream.pow(2).mean(-1).sqrt()
        sinks |= phi >= TAU
    return int(sinks.float().argmax()) if sinks.any() else len(tokens)


def test_output_rows_are_edited_as_prompt_rows_are(llava, llava_oracle, questions):
    """The same text as output and as prompt gives the same answer as long as it holds no sink."""
    layers = (1, 2, 3)
    steered = var(layers=list(layers))
    compared = 0
    for question in questions:
        whole = llava.run([question.job(steered, 12)])[0]
        count = min(first_sink(llava_oracle, question, whole.tokens, layers), 8)
        turn = question.short + whole.tokens[:count]
        again = llava.run([Job(turn, steered, 12 - count, images=question.images)])[0]
        assert again.tokens == whole.tokens[count:]
        assert again.logprobs == pytest.approx(whole.logprobs[count:], abs=1e-4)
        compared += count
    assert compared >= 8


def test_it_composes_with_vhr(llava, llava_oracle, questions):
    question = questions[0]
    steered = program(
        {**BASE, "layers": [1, 2]},
        {"method": "vhr", "heads": [[1, 3], [3, 7]], "alpha": 1.5},
        geometry=LLAVA,
    )
    edits = [question.edit(layers=[1, 2]), Scale({(1, 3), (3, 7)}, 1.5)]
    worst = largest_difference(
        llava,
        llava_oracle,
        [question.job(steered)],
        [edits],
        prompts=[question.ids],
        inputs=[question.pixels],
    )
    assert worst <= TOLERANCE


def test_strength_zero_is_the_unsteered_answer(llava, questions):
    steered, plain = llava.run([questions[2].job(var(p=0.0)), questions[2].job(None)])
    assert (steered.tokens, steered.logprobs) == (plain.tokens, plain.logprobs)


@pytest.mark.parametrize("p", [0.0, 0.6])
def test_a_prompt_without_an_image_is_refused(llava, processor, p):
    job = Job(processor.tokenizer("No picture here.")["input_ids"], var(p=p))
    with pytest.raises(SteeringError, match="the prompt has none") as caught:
        llava.run([job])
    assert (caught.value.reason, caught.value.param) == ("E_NO_IMAGE", "steering.methods[0]")


def text_move(ranges: list[tuple[int, int]], dims: list[int], tau: float, layers, p: float):
    """VAR's edit with marked text in the place of the image, at every row."""
    words = HeadWords.uniform(
        GEOMETRY,
        [(layer, head) for layer in layers for head in range(GEOMETRY.num_heads)],
        {HeadField.MOVED_SHARE: p},
        class_a=KeyClass(require=KeyTag.SINK),
        class_b=KeyClass(require=KeyTag.EMPHASISED, exclude=KeyTag.SINK),
    )
    marks = tuple(parse_span({"tokens": list(each)}) for each in ranges)
    return SteeringProgram(
        head_edits=(HeadEdit(words),), sink_rule=SinkRule(tuple(dims), tau), marks=marks
    )


def sink_dims(oracle, prompt: list[int], layer: int) -> list[int]:
    """The two largest dims of the first token's residual stream."""
    oracle.logits(prompt)
    return oracle.streams[layer][0].abs().topk(2).indices.tolist()


def test_text_sinks_of_a_real_model(harness, attention_oracle, prompts):
    """SmolLM2's own attention sink, found by the boundary op at every edited layer."""
    layers = range(4, 29)
    dims = sink_dims(attention_oracle, prompts[0], 15)
    jobs, edits = [], []
    for prompt, p in zip(prompts[:4], (0.2, 0.6, 0.9, 0.4), strict=True):
        marked = torch.zeros(len(prompt) + MAX_TOKENS - 1, dtype=torch.bool)
        marked[6 : len(prompt) - 4] = True
        steered = text_move([(6, len(prompt) - 4)], dims, 15.0, layers, p)
        jobs.append(Job(prompt, steered, MAX_TOKENS))
        edits.append([Move(marked, len(prompt), dims, 15.0, layers, p)])
    plain = attention_oracle.logits(prompts[0])[-1]
    edit = Move(edits[0][0].to[: len(prompts[0])], len(prompts[0]), dims, 15.0, layers, 0.2)
    moved = attention_oracle.logits(prompts[0], [edit])[-1]
    assert (moved - plain).abs().max() > 50 * TOLERANCE  # there are sinks to take from
    worst = largest_difference(harness, attention_oracle, jobs, edits)
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst <= TOLERANCE


def test_a_layer_that_was_not_observed_fails_the_request(llava, questions, monkeypatch):
    """If the residual stream cannot be seen, the request ends; it is not served without sinks."""
    from headway.server.engine import cpu_plan

    job = questions[0].job(var(layers=[2, 3]))
    llava.forget_cache()
    with monkeypatch.context() as patch:
        patch.setattr(cpu_plan.CpuStepPlan, "observe_residual", lambda *args: None)
        assert llava.run([job])[0].finish_reason == "error"
    report = llava.runner.steering.pop_report(job.request.report_id)
    assert "was not observed" in report.failure


def offline_requests(questions, folder, specs) -> list[dict]:
    """Requests for an engine of its own, the pictures in files."""
    requests = []
    for index, (question, spec) in enumerate(zip(questions, specs, strict=True)):
        files = []
        for at, image in enumerate(question.images):
            files.append(str(folder / f"{index}-{at}.png"))
            image.save(files[-1])
        requests.append(
            {
                "prompt": question.short,
                "images": files,
                "steering": spec and {"methods": spec},
                "sampling": {"temperature": 0.0, "max_tokens": MAX_TOKENS},
            }
        )
    return requests


@pytest.mark.slow
def test_the_boundary_op_survives_compilation(llava_folder, llava_oracle, questions, tmp_path):
    """torch.compile mode, float32, against the oracle; an unsteered request in the batch."""
    specs = [[{**BASE, "layers": [1, 2]}], [{**BASE, "layers": [1, 2, 3], "rho": 0.3}], None]
    options = [{"layers": [1, 2]}, {"layers": [1, 2, 3], "rho": 0.3}, None]
    asked = questions[:3]
    results = run_offline(
        tmp_path,
        True,
        offline_requests(asked, tmp_path, specs),
        model=str(llava_folder),
        dtype="float32",
        enforce_eager=False,
        max_model_len=512,
        limit_mm_per_prompt={"image": 2},
    )
    for question, option, result in zip(asked, options, results, strict=True):
        edits = [question.edit(**option)] if option else []
        sequence = question.ids + result["tokens"][:-1]
        logits = llava_oracle.logits(sequence, edits, **question.pixels)[-MAX_TOKENS:]
        expected = torch.log_softmax(logits, -1)[range(MAX_TOKENS), result["tokens"]].tolist()
        assert logits.argmax(-1).tolist() == result["tokens"]
        assert result["logprobs"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_two_tensor_parallel_ranks_equal_one(llava_folder, questions, tmp_path):
    """VHR, VAR, LocoRE and an unsteered request; heads of both ranks are edited."""
    specs = [
        [{"method": "vhr", "heads": [[0, 1], [1, 6], [3, 4]], "alpha": 2.0}],
        [{**BASE, "layers": [1, 2, 3]}],
        [{"method": "locore", "beta": 1.0, "layers": [0, 2], "history": "any"}],
        None,
    ]
    requests = offline_requests(questions, tmp_path, specs)
    requests += [{**each, "steering": None} for each in requests]
    engine = {
        "model": str(llava_folder),
        "dtype": "float32",
        "max_model_len": 512,
        "limit_mm_per_prompt": {"image": 2},
    }
    one = run_offline(tmp_path, True, requests, **engine)
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    two = run_offline(tmp_path, True, requests, environment=ranks, tensor_parallel_size=2, **engine)
    for got, want in zip(two, one, strict=True):
        assert got["finish_reason"] == "length"
        assert got["tokens"] == want["tokens"]
        assert got["logprobs"] == pytest.approx(want["logprobs"], abs=1e-4)
    for index in range(4):
        plain = pytest.approx(two[index + 4]["logprobs"], abs=1e-3)
        assert (two[index]["logprobs"] != plain) == (index < 3)
