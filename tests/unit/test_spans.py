"""Span selectors: what they refuse, and which tokens they find in a real chat prompt."""

from __future__ import annotations

from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from headway.server.engine.prompt_text import prompt_text
from headway.server.models.smollm2 import ensure_smollm2
from headway.steering import SteeringError
from headway.steering.rendered_prompt import RenderedPrompt
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


LLAMA_2 = ("[INST]", "[/INST]")  # ordinary text in this vocabulary, as in Llama 2's own


@pytest.mark.parametrize(
    ("question", "found"), [("I", None), ("Yes", ["Yes"]), ("Is it so?", ["Is it so?"])]
)
def test_a_template_without_special_tokens(tokenizer, question, found):
    """A message that may as well be the template's own text is refused, not guessed."""
    chat = [question, "Yes", question]
    text = f"{LLAMA_2[0]} {question} {LLAMA_2[1]} Yes {LLAMA_2[0]} {question} {LLAMA_2[1]}"
    prompt = prompt_text(tokenizer, tokenizer(text)["input_ids"])
    selectors = [parse_span({"message": 2})]
    if found is None:
        with pytest.raises(SteeringError, match="message 2, or contains it too"):
            locate(selectors, chat, prompt, "s")
    else:
        ranges = locate(selectors, chat, prompt, "s")
        texts = [prompt.text[prompt.offsets[a][0] : prompt.offsets[b - 1][1]] for a, b in ranges]
        assert [each.strip() for each in texts] == found
        assert prompt.offsets[ranges[0][0]][0] > text.index("Yes", 12)


PARTS = ["Look here.", "Who sat?\nThe cat?"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("Look here.\nWho sat?\nThe cat?", ["Look here.\nWho sat?"]),  # vLLM joins the parts
        ("Look here.Who sat?\nThe cat?", ["Look here.Who sat?"]),  # or the template does
        ("Look here.<file_sep><file_sep>Who sat?\n The cat?", ["Look here.", "Who sat?"]),
    ],
)
def test_parts_of_a_message_are_found_one_by_one(tokenizer, content, found):
    message = message_texts([{"content": [{"type": "text", "text": part} for part in PARTS]}])
    ids = tokenizer(f"<|im_start|>user\n{content}<|im_end|>\n")["input_ids"]
    prompt = prompt_text(tokenizer, ids)
    for selector in ({"message": 0, "end": 19}, {"text": "Look here.\nWho sat?"}):
        ranges = locate([parse_span(selector)], message, prompt, "s")
        assert [tokenizer.decode(ids[start:stop]) for start, stop in ranges] == found


def test_lines_are_found_next_to_each_other(tokenizer):
    """Not where another message ends with the same words."""
    text = "<|im_start|>user\nLook.<|im_end|>\n<|im_start|>user\nLook. Who?<|im_end|>"
    prompt = prompt_text(tokenizer, tokenizer(text)["input_ids"])
    ((start, _),) = locate([parse_span({"message": 1})], ["Look.", "Look.\nWho?"], prompt, "s")
    assert prompt.offsets[start][0] == text.rindex("Look.")


def test_parts_with_words_between_them_are_refused(tokenizer):
    ids = tokenizer("<|im_start|>user\nLook. Picture 1: Who?<|im_end|>")["input_ids"]
    with pytest.raises(SteeringError, match="changed the text of message 0"):
        locate([parse_span({"message": 0})], ["Look.\nWho?"], prompt_text(tokenizer, ids), "s")


def test_messages_that_a_selector_does_not_mean_may_be_changed(tokenizer):
    """As templates do that drop the reasoning of earlier turns."""
    chat = [{"role": "assistant", "content": "4."}, {"role": "user", "content": "Why 4?"}]
    prompt = prompt_text(tokenizer, render(tokenizer, chat))
    messages = ["<think>2 + 2</think>4.", "Why 4?"]
    assert locate([parse_span({"text": "Why"})], messages, prompt, "s")
    with pytest.raises(SteeringError, match="changed the text of message 0"):
        locate([parse_span({"text": "4"})], messages, prompt, "s")


def test_a_token_without_characters_is_in_no_span():
    prompt = RenderedPrompt("ab", [(0, 1), (1, 1), (1, 2)])
    assert locate([parse_span({"text": "ab"})], None, prompt, "s") == ((0, 1), (2, 3))


def test_an_empty_token_range_is_refused_before_rendering():
    with pytest.raises(SteeringError, match=r"s\[0\].tokens: selects no token"):
        check_spans([parse_span({"tokens": [-3, -5]})], None, "s")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab \n漢🙂", max_size=12), min_size=1, max_size=5),
    st.data(),
)
def test_message_characters_and_marked_tokens_agree(tokenizer, contents, data):
    """Every marked token has a character of the span, and every such token is marked."""
    chat = [{"role": "user", "content": content} for content in contents]
    index = data.draw(st.integers(0, len(contents) - 1))
    text = contents[index]
    if not text:
        return
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    prompt = prompt_text(tokenizer, render(tokenizer, chat))
    head = "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents[:index])
    at = prompt.text.index("<|im_end|>\n") + len("<|im_end|>\n")  # the default system message
    at += len(head) + len("<|im_start|>user\n")
    low = at + max(start, len(text) - len(text.lstrip()))
    high = at + min(end, len(text.rstrip()))
    expected = {
        token
        for token, (first, last) in enumerate(prompt.offsets)
        if low < high and first < high and last > low
    }
    selector = parse_span({"message": index, "start": start, "end": end})
    if not expected:
        with pytest.raises(SteeringError, match="selects no token"):
            locate([selector], contents, prompt, "s")
        return
    ranges = locate([selector], contents, prompt, "s")
    assert {token for start, stop in ranges for token in range(start, stop)} == expected


def test_many_occurrences_in_a_long_chat_take_little_time(tokenizer):
    """The request holds up all others while its spans are looked for."""
    contents = ["a b " * 20] * 200
    prompt = prompt_text(
        tokenizer, render(tokenizer, [{"role": "user", "content": text} for text in contents])
    )
    began = perf_counter()
    locate([parse_span({"text": "a"})] * 64, contents, prompt, "s")
    assert perf_counter() - began < 4.0


def marked_text(prompt: RenderedPrompt, messages: list[str], index: int) -> tuple[int, str]:
    """Where the mark of a message begins, and its text. Offsets are of single characters."""
    ((start, stop),) = locate([parse_span({"message": index})], messages, prompt, "s")
    return start, prompt.text[start:stop]


def by_characters(text: str, *specials: str) -> RenderedPrompt:
    marks = [
        (at, at + len(special))
        for special in specials
        for at in range(len(text))
        if text.startswith(special, at)
    ]
    return RenderedPrompt(text, [(at, at + 1) for at in range(len(text))], sorted(marks))


CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    "messages",
    [
        ["Answer yes or no: yes", "yes"],
        ["yes", "yes"],
        ["Answer yes", "Is it so? yes", "yes"],
        ["Say yes.", "Certainly, yes.\nOr yes"],
    ],
)
@pytest.mark.parametrize("system", ["", "<|im_start|>system\nYou are kind.<|im_end|>\n"])
def test_a_message_that_is_to_be_continued_is_the_last(messages, system):
    """No special token follows it, while one follows earlier messages of the same words."""
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n" for text in messages[:-1]]
    text = f"{system}{''.join(turns)}<|im_start|>assistant\n{messages[-1]}"
    prompt = by_characters(text, *CHATML)
    at = len(text) - len(messages[-1])
    assert marked_text(prompt, messages, -1) == (at, messages[-1])
    at = len(system) + len("<|im_start|>user\n")
    assert marked_text(prompt, messages, 0) == (at, messages[0])


def test_a_continued_message_that_its_header_contains_is_refused():
    prompt = by_characters(
        "<|im_start|>user\nName: an<|im_end|>\n<|im_start|>assistant\nan", *CHATML
    )
    with pytest.raises(SteeringError, match="message 1, or contains it too"):
        locate([parse_span({"message": 1})], ["Name: an", "an"], prompt, "s")


@pytest.mark.parametrize(
    "messages", [["Yes", "Yes", "Yes"], ["So?", "Yes", "Yes"], ["So?", "Oh, Yes", "Yes"]]
)
def test_a_template_that_closes_the_assistants_messages_only(messages):
    ask, answer, again = messages
    text = f"[INST] {ask} [/INST] {answer}</s>[INST] {again} [/INST]"
    prompt = by_characters(text, "</s>")
    found = [marked_text(prompt, messages, index) for index in range(3)]
    assert [each for _, each in found] == messages
    assert [at for at, _ in found] == [
        len("[INST] "),
        text.index(f"{answer}</s>"),
        text.rindex(again),
    ]


def test_a_message_that_may_be_one_or_another_is_refused():
    """The template has words of its own that a message repeats."""
    text = "[INST] <<SYS>> Say Yes or No. <</SYS>> Yes [/INST] Yes</s>[INST] Yes [/INST]"
    prompt = by_characters(text, "</s>")
    for index in (0, 2):
        with pytest.raises(SteeringError, match=f"message {index}, or contains it too"):
            locate([parse_span({"message": index})], ["Yes"] * 3, prompt, "s")


def test_the_words_of_a_message_that_was_changed_are_not_those_of_another():
    """The template drops the reasoning of the answer, and leaves the words of the question."""
    text = "<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    messages = ["yes", "<think>so</think>yes"]
    with pytest.raises(SteeringError, match="message 0, or contains it too"):
        locate([parse_span({"message": 0})], messages, by_characters(text, *CHATML), "s")


def test_a_role_in_front_of_a_special_token_is_no_message():
    marks = ("<|start|>", "<|end|>", "<|eot|>")
    head = "<|start|>{}<|end|>\n\n"
    text = f"{head.format('user')}assistant<|eot|>{head.format('assistant')}"
    with pytest.raises(SteeringError, match="message 0, or contains it too"):
        locate([parse_span({"message": 0})], ["assistant"], by_characters(text, *marks), "s")
