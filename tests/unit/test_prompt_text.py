"""Offsets of tokens: exact for every kind of vocabulary, or refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headway.server.engine.prompt_text import MAX_WAITING, bytewise, prompt_text, stepwise
from headway.server.models.smollm2 import ensure_smollm2
from headway.steering import SteeringError

pytestmark = pytest.mark.unit

CORPUS = ["the quick brown fox", "naïve café", "漢字 かな", "again and again", "A  B   C"] * 3
SPECIALS = ["<unk>", "<|user|>", "<|end|>", "<image>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SAMPLES = [
    "plain words",
    "naïve cafe\u0301 🙂👩‍👩‍👧 漢字",
    "  two  spaces \n\n ",
    "<|user|> look <image><image><image> here<|end|>",
    "\ufffd as it stands",
]


def smollm2() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ensure_smollm2())


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2's: its own offsets leave out white space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: bytes for unknown characters, one space put in front and taken away again."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = BpeTrainer(vocab_size=900, special_tokens=SPECIALS + BYTES, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Trained as special tokens to have ids; they are ordinary ones.
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [each for each in values["added_tokens"] if each["id"] < len(SPECIALS)]
    tokenizer = Tokenizer.from_str(json.dumps(values))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module", params=[smollm2, byte_level, sentence_piece])
def tokenizer(request):
    return request.param()


def encode(tokenizer, text: str, apart: bool = False) -> list[int]:
    """apart: each character by itself, a cut that the tokenizer would not make."""
    pieces = list(text) if apart else [text]
    return [
        token for piece in pieces for token in tokenizer(piece, add_special_tokens=False).input_ids
    ]


def check(tokenizer, ids: list[int]) -> None:
    """The offsets ascend, cover the decoded text, and fit what the tokens decode to."""
    prompt = prompt_text(tokenizer, ids)
    text, offsets = prompt.text, prompt.offsets
    assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(offsets) == len(ids)
    starts, stops = zip(*offsets, strict=True)
    assert list(starts) == sorted(starts) and list(stops) == sorted(stops)
    reached = 0
    for start, stop in offsets:
        assert start <= reached
        reached = max(reached, stop)
    assert reached == len(text)
    for token, (start, stop) in zip(ids, offsets, strict=True):
        piece = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "\ufffd" not in piece + text[start:stop]:
            assert piece.strip() in text[start:stop]


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("apart", [False, True])
def test_samples(tokenizer, text, apart):
    check(tokenizer, encode(tokenizer, text, apart))


@settings(max_examples=80, deadline=None)
@given(st.text(min_size=1, max_size=30), st.booleans())
def test_any_text(tokenizer, text, apart):
    ids = encode(tokenizer, text, apart)
    if ids:
        check(tokenizer, ids)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 350), min_size=1, max_size=20))
def test_any_tokens_are_exact_or_refused(tokenizer, ids):
    """A client may send tokens that are no text."""
    try:
        check(tokenizer, ids)
    except SteeringError as error:
        assert error.reason == "E_UNSUPPORTED"
        assert "\ufffd" in tokenizer.decode(ids)


def test_every_token_of_a_character_stands_for_it():
    tokenizer = byte_level()
    ids = encode(tokenizer, "a🙂b")
    assert prompt_text(tokenizer, ids).offsets == [(0, 1), *[(1, 2)] * (len(ids) - 2), (2, 3)]


def test_white_space_belongs_to_the_token_that_has_it():
    tokenizer = byte_level()
    prompt = prompt_text(tokenizer, encode(tokenizer, "fox  fox"))
    assert "".join(prompt.text[start:stop] for start, stop in prompt.offsets) == "fox  fox"


def test_bytewise_and_stepwise_agree():
    tokenizer = smollm2()
    for text in SAMPLES[:4]:
        ids = encode(tokenizer, text)
        backend = tokenizer.backend_tokenizer
        exact, coarse = bytewise(backend, ids, text), stepwise(backend, ids, text)
        assert exact and coarse
        for (start, stop), (low, high) in zip(exact, coarse, strict=True):
            assert low <= start and stop <= high


def test_special_tokens_are_found_whatever_their_role(tokenizer):
    name = "<file_sep>" if "<file_sep>" in tokenizer.get_vocab() else "<|end|>"
    prompt = prompt_text(tokenizer, encode(tokenizer, f"fox{name}fox"))
    assert [prompt.text[start:stop] for start, stop in prompt.specials] == [name]


def test_tokens_that_complete_no_character_are_bounded():
    tokenizer = sentence_piece()
    ids = encode(tokenizer, "\ufffd" * MAX_WAITING + "a")
    with pytest.raises(SteeringError, match="no text"):
        prompt_text(tokenizer, ids)


def test_other_tokenizers_are_refused():
    for other in (SimpleNamespace(is_fast=False), SimpleNamespace(is_fast=True)):
        with pytest.raises(SteeringError, match="fast tokenizer"):
            prompt_text(other, [1])
