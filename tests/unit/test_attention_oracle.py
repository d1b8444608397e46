"""The oracle of attention edits against plain models and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.attention_oracle import (
    AttentionOracle,
    Emphasis,
    Identity,
    Locore,
    Move,
    Scale,
    Uniform,
    Var,
)

pytestmark = pytest.mark.unit

TOKENS = list(range(3, 23))
IMAGE = torch.tensor([4 <= position < 10 for position in range(20)])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def plain(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


@pytest.fixture(scope="module")
def oracle(plain, model) -> AttentionOracle:
    return AttentionOracle(model)


def test_without_edits_it_is_the_model(oracle, plain):
    assert (oracle.logits(TOKENS) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("as_code", [False, True])
def test_var_keeps_row_sums_and_edits_some_rows(oracle, plain, as_code):
    edit = Var(IMAGE, 15, [0, 1], range(2), tau=1.5, rho=0.6, as_code=as_code)
    logits = oracle.logits(TOKENS, [edit])
    assert all((sums - 1).abs().max() < 1e-5 for sums in oracle.row_sums)
    assert 0 < edit.met < edit.considered == 2 * 4 * 10
    assert (logits - plain).abs().max() > 1e-3
    assert (logits[:10] - plain[:10]).abs().max() < 1e-5  # rows up to the image's end


def test_locore_is_a_logit_bias(oracle):
    edit = Locore(12, beta=0.5, window=3, layers=range(2))
    logits = oracle.logits(TOKENS, [edit])

    class Bias:
        def __call__(self, a, layer):
            scores = a.log()
            for row in range(12, 20):
                scores[:, row, max(12, row - 3) : row] += math.log(1.5)
            a[:] = torch.softmax(scores, -1)

    assert (logits - oracle.logits(TOKENS, [Bias()])).abs().max() < 1e-5


@pytest.mark.parametrize(
    "edit",
    [
        Move(IMAGE, 15, [0, 1], 1.5, range(2), 0.6),
        Emphasis(IMAGE, 15),
        Uniform(None),
        Identity(None, 0.5),
        Scale(None, 2.0),
        Locore(12, renormalize=False, any_history=True, heads={(1, 2)}),
    ],
)
def test_every_edit_matters(oracle, plain, edit):
    assert (oracle.logits(TOKENS, [edit]) - plain).abs().max() > 1e-3


def test_emphasis_on_everything_is_nothing(oracle, plain):
    edit = Emphasis(torch.ones(20, dtype=torch.bool), 15)
    assert (oracle.logits(TOKENS, [edit]) - plain).abs().max() < 1e-5
