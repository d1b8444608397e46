"""Emphasis (PASTA) in the real engine against edited attention matrices."""

from __future__ import annotations

import pytest
import torch

from tests.attention_oracle import Emphasis, Locore, Scale
from tests.engine.harness import Job, largest_difference, program

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
QUESTION = "The key is under the mat. The cat is on the roof. Where is the key?"


@pytest.fixture(scope="module")
def prompt(oracle) -> list[int]:
    return oracle.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )


MAX_TOKENS = 8


def mask(ranges: list[tuple[int, int]], length: int) -> torch.Tensor:
    marked = torch.zeros(length, dtype=torch.bool)
    for start, stop in ranges:
        marked[start:stop] = True
    return marked


def emphasis(spans: list[dict], **options) -> dict:
    return {"method": "emphasis", "spans": spans, **options}


def test_logits_equal_the_oracle(harness, attention_oracle, prompt):
    """Strong and weak, all heads and some, prompt and output positions, one batch."""
    length = len(prompt)
    total = length + MAX_TOKENS - 1
    ranges = [(4, 9), (length - 6, length - 4)]
    spans = [{"tokens": list(each)} for each in ranges]
    marked = mask(ranges, total)
    heads = [[3, 1], [9, 0], [21, 8]]
    pairs = {(layer, head) for layer, head in heads}
    variants = [
        (program(emphasis(spans)), [Emphasis(marked, length)]),
        (program(emphasis(spans, alpha=0.5)), [Emphasis(marked, length, 0.5)]),
        (program(emphasis(spans, heads=heads)), [Emphasis(marked, length, heads=pairs)]),
        (
            program(emphasis(spans, layers=[1, 12], alpha=0.1)),
            [Emphasis(marked, length, 0.1, {(at, head) for at in (1, 12) for head in range(9)})],
        ),
        (
            program(
                emphasis(spans, alpha=0.2),
                {"method": "locore", "beta": 0.5},
                {"method": "vhr", "heads": heads, "alpha": 1.4},
            ),
            [
                Emphasis(marked, length, 0.2),
                Locore(length, 0.5, layers=range(8, 14)),
                Scale(pairs, 1.4),
            ],
        ),
        (None, []),
    ]
    jobs = [Job(prompt, steered, MAX_TOKENS) for steered, _ in variants]
    edits = [edit for _, edit in variants]
    worst = largest_difference(harness, attention_oracle, jobs, edits)
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ({"text": "The key is under the mat."}, "The key is under the mat."),
        ({"message": 0, "start": 26, "end": 49}, "The cat is on the roof."),
        ({"message": -1, "start": -17}, "Where is the key?"),
    ],
)
def test_text_spans_mark_the_tokens_of_their_text(harness, oracle, prompt, span, text):
    """A span of text steers as the span of its token positions does."""
    tokenizer = oracle.tokenizer
    starts = [
        start
        for start in range(len(prompt))
        for stop in range(start, len(prompt))
        if tokenizer.decode(prompt[start:stop]).strip() == text
    ]
    start = max(starts)
    stop = next(
        stop
        for stop in range(start, len(prompt))
        if tokenizer.decode(prompt[start:stop]).strip() == text
    )
    by_text = Job(prompt, program(emphasis([span])), messages=(QUESTION,))
    by_position = Job(prompt, program(emphasis([{"tokens": [start, stop]}])))
    got, want = harness.run([by_text, by_position])
    assert got.finish_reason == want.finish_reason == "length"
    assert got.tokens == want.tokens
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)


def test_what_is_emphasised_changes_the_answer(harness, prompt):
    """The question is about the key; emphasis on the cat turns the answer to the roof."""
    answers = []
    for text in ("The key is under the mat.", "The cat is on the roof."):
        job = Job(prompt, program(emphasis([{"text": text}])), 16, messages=(QUESTION,))
        answers.append(harness.run([job])[0].tokens)
    assert answers[0] != answers[1]


def test_a_span_that_is_not_in_the_prompt_is_refused(harness, prompt):
    from headway.steering import SteeringError

    job = Job(prompt, program(emphasis([{"text": "a dog"}])), messages=(QUESTION,))
    with pytest.raises(SteeringError, match="no message contains 'a dog'") as caught:
        harness.run([job])
    assert (caught.value.reason, caught.value.param) == (
        "E_BAD_PARAM",
        "steering.methods[0].spans[0].text",
    )


def test_alpha_one_is_the_unsteered_answer(harness, prompt):
    one = program(emphasis([{"tokens": [0, 5]}], alpha=1.0))
    steered, plain = harness.run([Job(prompt, one), Job(prompt)])
    assert steered == plain
