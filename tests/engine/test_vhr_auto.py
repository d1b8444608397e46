"""Heads that VHR chooses by the prompt, in the real engine, against the oracle's choice.

On the demo image model and its scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams

from headway.benchmarks.quality.scenes import CAPTION_PROMPT, PARTNER, question, scene
from headway.server.engine.report import EngineReport
from headway.server.models.demo_vlm import END_TOKEN, IMAGE_TOKEN, TOKENS_PER_IMAGE
from headway.steering import ModelGeometry, SteeringError, SteeringProgram
from tests.engine.harness import Harness, Job, program
from tests.engine.schedules import assert_same
from tests.vhr_oracle import VHROracle

pytestmark = pytest.mark.engine

DEMO = ModelGeometry(30, 9, 3, 64, 576, supports_images=True)
LAYERS = list(range(1, 15))
DEFAULT_LAYERS = [1, *range(17, 30)]
"""Index 1 and the last 14 of 32 layers, for a model of 30."""
STEP_LIMIT = 512 - 15
"""Tokens of a step of the fixture's engine, when each of the other sequences needs one."""
FULL_STOP = 30
ALPHA = 1.5
LENGTH = 6
TOLERANCE = 1e-3
TIE = 1e-4
"""Relative distance from another choice below which rounding may decide."""


class Asked:
    """A question about pictures, as the engine takes it and as it expands it."""

    def __init__(self, processor: Any, text: str, *pictures: tuple[str, int]) -> None:
        """text: with `<image>` for every picture; pictures: (split, index)."""
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        self.images = [scene(*picture).image for picture in pictures]
        self.short = processor.tokenizer(prompt)["input_ids"]
        inputs = processor(images=self.images, text=prompt, return_tensors="pt")
        self.ids: list[int] = inputs["input_ids"][0].tolist()
        self.pixels = inputs["pixel_values"]
        assert self.ids.count(IMAGE_TOKEN) == TOKENS_PER_IMAGE * len(pictures)

    def job(self, steered: SteeringProgram | None, max_tokens: int = LENGTH) -> Job:
        return Job(self.short, steered, max_tokens, images=self.images)


def auto(*further: dict[str, Any], **options: Any) -> SteeringProgram:
    method = {"method": "vhr", "alpha": ALPHA, "heads": "auto", "layers": LAYERS} | options
    return program(method, *further, geometry=DEMO)


def report_of(harness: Harness, job: Job) -> EngineReport:
    """What the worker tells about a job that has run."""
    report: EngineReport = harness.runner.steering.pop_report(job.request.report_id)
    assert report.is_complete, report
    assert report.heads == sorted(report.heads)
    return report


@pytest.fixture(scope="module")
def asked(demo_vlm_processor) -> list[Asked]:
    """24 pictures of two splits: captions, and questions for present and for absent objects."""
    found = []
    for split in ("test_counter", "test_prior"):
        for index in range(12):
            name = scene(split, index).objects[0]
            texts = [CAPTION_PROMPT, question(name), question(PARTNER[name])]
            found.append(Asked(demo_vlm_processor, f"<image>{texts[index % 3]}", (split, index)))
    return found


# The choice, against the oracle


def agrees(
    oracle: VHROracle,
    one: Asked,
    heads: Sequence[Sequence[int]],
    layers: Sequence[int] = LAYERS,
    baseline: bool = False,
) -> bool:
    """Whether the oracle chooses the same heads; where not, its own choice must be a tie.

    Layers above such a tie saw other scales, and are not compared.
    """
    choices = oracle.vhd(one.ids, one.pixels, layers, ALPHA, baseline)
    assert {layer for layer, _ in heads} <= set(layers)
    for layer in layers:
        chosen = [head for at, head in heads if at == layer]
        if chosen != choices[layer].heads:
            assert choices[layer].margin < TIE, f"layer {layer}: {chosen}, {choices[layer]}"
            return False
    return True


def largest_difference(
    oracle: VHROracle, one: Asked, rows: Sequence[torch.Tensor], heads: Sequence[Sequence[int]]
) -> float:
    """Of the logits of output tokens, from the oracle's with these heads scaled."""
    tokens = [int(row.argmax()) for row in rows]
    logits = oracle.logits(one.ids + tokens[:-1], one.pixels, heads, ALPHA)
    return float((torch.stack(list(rows)) - logits[-len(tokens) :]).abs().max())


def check_against_the_oracle(
    harness: Harness,
    oracle: VHROracle,
    asked: Sequence[Asked],
    steered: SteeringProgram,
    layers: Sequence[int] = LAYERS,
    baseline: bool = False,
) -> list[list[list[int]]]:
    """Run all in one batch; compare heads and the logits of every output token."""
    harness.forget_cache()
    jobs = [one.job(steered) for one in asked]
    recorded = harness.record_logits(jobs)
    found, ties, worst = [], 0, 0.0
    for one, job, rows in zip(asked, jobs, recorded, strict=True):
        heads = report_of(harness, job).heads
        ties += not agrees(oracle, one, heads, layers, baseline)
        worst = max(worst, largest_difference(oracle, one, rows, heads))
        found.append(heads)
    print(f"largest difference of a logit: {worst:.2e}; {ties} ties")
    assert ties <= 1
    assert worst <= TOLERANCE
    return found


def test_heads_and_logits_equal_the_oracle(demo_vlm, vhr_oracle, asked):
    found = check_against_the_oracle(demo_vlm, vhr_oracle, asked, auto())
    # So that the comparison tells a wrong choice from a right one: prompts choose different
    # heads, and one head more or less is seen in the logits.
    assert len({str(heads) for heads in found}) > len(asked) // 2
    one, heads = asked[1], found[1]
    right = vhr_oracle.logits(one.ids, one.pixels, heads, ALPHA)[-1]
    for left_out in (heads[0], heads[-1]):
        rest = [head for head in heads if head != left_out]
        wrong = vhr_oracle.logits(one.ids, one.pixels, rest, ALPHA)[-1]
        assert (wrong - right).abs().max() > 10 * TOLERANCE


def test_two_images_in_a_prompt(demo_vlm, vhr_oracle, demo_vlm_processor):
    """Both leave the text-only prompt, wherever they stand."""
    pictures = ("test_counter", 2), ("test_prior", 3)
    texts = [
        "<image><image>Is there a fork in the image?",
        "Compare <image> with <image>.",
        "Look: <image> Is it the same as <image> this?",
    ]
    pairs = [Asked(demo_vlm_processor, text, *pictures) for text in texts]
    check_against_the_oracle(demo_vlm, vhr_oracle, pairs, auto())


def test_a_reinforced_baseline(demo_vlm, vhr_oracle, asked):
    """The text-only prompt is scaled in step with the other one; it chooses other heads then."""
    some = asked[:4]
    found = check_against_the_oracle(
        demo_vlm, vhr_oracle, some, auto(reinforce_baseline=True), baseline=True
    )
    raw = [one.job(auto()) for one in some]
    demo_vlm.run(raw)
    for heads, job in zip(found, raw, strict=True):
        assert heads != report_of(demo_vlm, job).heads


def test_a_reinforced_baseline_waits_for_a_grammar(demo_vlm, asked):
    """Until it is compiled the request cannot run, and its text-only prompt must not run alone."""

    def heads(**sampling: Any) -> list[list[list[int]]]:
        demo_vlm.forget_cache()
        jobs = [one.job(auto(reinforce_baseline=True)) for one in asked[:2]]
        for job in jobs:
            job.sampling = sampling
        assert all(result.finish_reason == "length" for result in demo_vlm.run(jobs))
        return [report_of(demo_vlm, job).heads for job in jobs]

    # Longer than the answer may be.
    assert heads(structured_outputs=StructuredOutputsParams(regex="[a-z ]{200}")) == heads()


def test_the_default_layers(demo_vlm, vhr_oracle, asked):
    steered = auto(layers="default")
    found = check_against_the_oracle(demo_vlm, vhr_oracle, asked[4:7], steered, DEFAULT_LAYERS)
    for heads in found:
        assert sorted({layer for layer, _ in heads}) == DEFAULT_LAYERS


def test_the_model_is_that_of_transformers(demo_vlm, vhr_oracle, demo_vlm_processor):
    """Unsteered greedy answers to a yes/no question and a caption of every picture."""
    pairs = []
    for index in range(20):
        picture = ("test_counter", "test_prior")[index % 2], index
        name = scene(*picture).objects[-1]
        pairs.append((Asked(demo_vlm_processor, f"<image>{question(name)}", picture), 3))
        pairs.append((Asked(demo_vlm_processor, f"<image>{CAPTION_PROMPT}", picture), 16))
    results = demo_vlm.run([one.job(None, length) for one, length in pairs])
    answered = set()
    for (one, _), result in zip(pairs, results, strict=True):
        tokens = result.tokens
        if END_TOKEN in tokens:
            tokens = tokens[: tokens.index(END_TOKEN) + 1]
        # Greedy tokens are those that each follow from the ones before them.
        logits = vhr_oracle.logits(one.ids + tokens[:-1], one.pixels)[-len(tokens) :]
        assert tokens == logits.argmax(-1).tolist()
        answered.add(demo_vlm_processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(answered) > 10


# What it refuses, and what it saves


def padded(one: Asked, length: int, steered: SteeringProgram) -> Job:
    """The same question behind so many full stops that the expanded prompt has this length."""
    after = one.short.index(IMAGE_TOKEN) + 1
    stops = [FULL_STOP] * (length - len(one.ids))
    prompt = one.short[:after] + stops + one.short[after:]
    return Job(prompt, steered, LENGTH, images=one.images)


@pytest.mark.parametrize("baseline", [False, True])
def test_a_prompt_is_refused_where_it_cannot_run_in_one_step(demo_vlm, asked, baseline):
    """A prompt of just that length runs, however full the engine is; the error names the limit.

    With a reinforced baseline the prompt without the image runs in the same step.
    """
    steered = auto(reinforce_baseline=baseline)
    most = (STEP_LIMIT + TOKENS_PER_IMAGE) // 2 if baseline else STEP_LIMIT
    demo_vlm.forget_cache()
    job = padded(asked[0], most, steered)
    (alone,) = demo_vlm.run([job])
    heads = report_of(demo_vlm, job).heads
    demo_vlm.forget_cache()
    crowd = [asked[index].job(None, 12) for index in range(15)]
    job = padded(asked[0], most, steered)
    result = demo_vlm.run([*crowd, job])[-1]
    assert_same(result, alone)
    assert report_of(demo_vlm, job).heads == heads
    with pytest.raises(SteeringError, match=f"at most {STEP_LIMIT} tokens") as caught:
        demo_vlm.run([padded(asked[0], most + 1, steered)])
    assert caught.value.reason == "E_PROMPT_TOO_LONG"
    # The image of a refused request is asked for again by the next one.
    assert demo_vlm.run([asked[0].job(None, 1)])[0].finish_reason == "length"


def test_a_prompt_without_an_image_is_refused(demo_vlm, demo_vlm_processor):
    job = Job(demo_vlm_processor.tokenizer("No picture here.")["input_ids"], auto())
    with pytest.raises(SteeringError, match="the prompt has none") as caught:
        demo_vlm.run([job])
    assert (caught.value.reason, caught.value.param) == ("E_NO_IMAGE", "steering.methods[0]")


def test_a_text_is_run_without_its_image_once(demo_vlm, demo_vlm_processor):
    """Further requests with the same text take what the first one left."""

    def passes(text: str, *picture: Any) -> int:
        before = demo_vlm.scheduler.text_passes.passes
        demo_vlm.run([Asked(demo_vlm_processor, f"<image>{text}", picture).job(auto(), 1)])
        return demo_vlm.scheduler.text_passes.passes - before

    demo_vlm.forget_cache()
    assert passes("How many things are there?", "test_counter", 5) == 1
    assert passes("How many things are there?", "test_counter", 5) == 0
    assert passes("How many things are there?", "test_prior", 6) == 0
    assert passes("What is the largest thing there?", "test_counter", 5) == 1
