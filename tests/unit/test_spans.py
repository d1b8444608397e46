"""Span selectors: what they refuse, and which tokens they find in a real chat prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from headway.server.engine.prompt_text import prompt_text, stepwise
from headway.server.models.smollm2 import ensure_smollm2
from headway.steering import SteeringError
from headway.steering.spans import check_spans, locate, message_texts, parse_span

pytestmark = pytest.mark.unit

CHAT = [
    {"role": "user", "content": "The cat sat. The dog ran."},
    {"role": "assistant", "content": "  Noted.\n"},
    {"role": "user", "content": [{"type": "text", "text": "Who sat?"}, {"type": "image_url"}]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ensure_smollm2())


def render(tokenizer, chat: list[dict]) -> list[int]:
    plain = [
        {**message, "content": text}
        for message, text in zip(chat, message_texts(chat), strict=True)
    ]
    return tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)


def marked(tokenizer, selector: dict, chat: list[dict] = CHAT) -> list[str]:
    """The text of each marked range."""
    ids = render(tokenizer, chat)
    prompt = prompt_text(tokenizer, ids)
    found = locate([parse_span(selector)], message_texts(chat), prompt, "spans")
    return [tokenizer.decode(ids[start:stop]) for start, stop in found]


@pytest.mark.parametrize(
    ("selector", "texts"),
    [
        ({"text": "cat sat"}, [" cat sat"]),
        ({"text": "sat"}, [" sat", " sat"]),
        ({"text": "The"}, ["The", " The"]),
        ({"message": 0, "start": 4, "end": 7}, [" cat"]),
        ({"message": 0, "start": 13}, [" The dog ran."]),
        ({"message": 0, "start": -8, "end": -1}, [" dog ran"]),
        ({"message": -1}, ["Who sat?"]),
        ({"message": 1}, [" Noted."]),  # white space around a message is not part of it
        ({"message": 2, "start": 0, "end": 3}, ["Who"]),
    ],
)
def test_spans_of_a_chat(tokenizer, selector, texts):
    assert marked(tokenizer, selector) == texts


def test_the_templates_own_text_is_no_message(tokenizer):
    """SmolLM2's template puts a system message of its own in front, and `assistant` behind."""
    ids = render(tokenizer, CHAT)
    assert "helpful" in tokenizer.decode(ids)
    for text in ("helpful", "assistant"):
        chat = [{"role": "user", "content": text}]
        ids = render(tokenizer, chat)
        prompt = prompt_text(tokenizer, ids)
        ((start, stop),) = locate([parse_span({"text": text})], [text], prompt, "spans")
        assert tokenizer.decode(ids[start:stop]) == text
        assert tokenizer.decode(ids[:start]).endswith("user\n")


def test_equal_messages_are_told_apart(tokenizer):
    chat = [{"role": "user", "content": "Again."}] * 3
    starts = []
    for index in range(3):
        prompt = prompt_text(tokenizer, render(tokenizer, chat))
        found = locate([parse_span({"message": index})], ["Again."] * 3, prompt, "spans")
        starts.append(found[0][0])
    assert starts == sorted(set(starts))


def test_token_positions_and_merging(tokenizer):
    prompt = prompt_text(tokenizer, list(range(100, 120)))
    selectors = [parse_span({"tokens": tokens}) for tokens in ([0, 3], [3, 5], [-2, 20], [4, 6])]
    assert locate(selectors, None, prompt, "spans") == ((0, 6), (18, 20))


@pytest.mark.parametrize(
    ("selector", "messages", "param", "words"),
    [
        ({"text": "bird"}, ["cat"], "s[0].text", "'bird'"),
        ({"message": 2}, ["cat", "dog"], "s[0].message", "-2 .. 1"),
        ({"message": 0, "start": 2, "end": 2}, ["cat"], "s[0]", "empty"),
        ({"message": 0, "start": 3, "end": 9}, ["cat"], "s[0].end", "-3 .. 3"),
        ({"message": 0, "start": -4}, ["cat"], "s[0].start", "-3 .. 3"),
        ({"message": 0}, None, "s[0].message", "no chat"),
    ],
)
def test_bad_spans_are_refused_before_rendering(selector, messages, param, words):
    with pytest.raises(SteeringError) as caught:
        check_spans([parse_span(selector)], messages, "s")
    assert (caught.value.reason, caught.value.param) == ("E_BAD_PARAM", param)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "selector",
    [{}, {"text": "a", "tokens": [0, 1]}, {"text": ""}, {"tokens": [1]}, {"start": 1}, {"x": 1}],
)
def test_malformed_selectors(selector):
    with pytest.raises(SteeringError, match="E_BAD_PARAM|exactly|least|unknown|belong"):
        parse_span(selector)


@pytest.mark.parametrize("tokens", [[5, 5], [7, 3]])
def test_a_range_without_tokens_is_refused(tokenizer, tokens):
    prompt = prompt_text(tokenizer, list(range(100, 120)))
    with pytest.raises(SteeringError, match="selects no token"):
        locate([parse_span({"tokens": tokens})], None, prompt, "s")


def test_a_template_that_changes_the_text_is_told(tokenizer):
    prompt = prompt_text(tokenizer, tokenizer("SHOUTED")["input_ids"])
    with pytest.raises(SteeringError, match="changed the text of message 0"):
        locate([parse_span({"message": 0})], ["shouted"], prompt, "s")


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=40), st.randoms())
def test_offsets_cover_the_text(tokenizer, text, rng):
    """Also where tokens are parts of characters, and where the cut is not the tokenizer's own."""
    ids = [tok for char in text for tok in tokenizer(char, add_special_tokens=False)["input_ids"]]
    if rng.random() < 0.5:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = prompt_text(tokenizer, ids)
    assert prompt.text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(prompt.offsets) == len(ids)
    covered = {at for start, stop in prompt.offsets for at in range(start, stop)}
    assert covered == set(range(len(prompt.text)))


def test_stepwise_agrees_with_the_tokenizers_offsets(tokenizer):
    ids = tokenizer("naïve 🙂 café 漢字 <|im_end|> x")["input_ids"]
    prompt = prompt_text(tokenizer, ids)
    text, offsets = stepwise(tokenizer, ids, prompt.text)
    assert text == prompt.text
    for (start, stop), (low, high) in zip(offsets, prompt.offsets, strict=True):
        assert start <= low and high <= stop or (start, stop) == (low, high)
