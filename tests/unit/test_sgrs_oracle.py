"""The oracle of SGRS against finite differences, plain models and cases done by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.attention_oracle import Locore
from tests.sgrs_oracle import Decision, decide, edit_with, forward, output_history, saliencies

pytestmark = pytest.mark.unit

TOKENS = list(range(3, 15))
PROMPT_LEN = 7
HISTORY = output_history(len(TOKENS), PROMPT_LEN)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    # transformers' own norm computes in float32, whose noise would drown finite differences.
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.RMSNorm(32, eps=config.rms_norm_eps)
        layer.post_attention_layernorm = torch.nn.RMSNorm(32, eps=config.rms_norm_eps)
    model.model.norm = torch.nn.RMSNorm(32, eps=config.rms_norm_eps)
    return model.double().eval()


def test_the_unedited_pass_is_the_model(model):
    _, logits = forward(model, TOKENS)
    with torch.no_grad():
        plain = model(torch.tensor([TOKENS])).logits[0]
    assert (logits - plain).abs().max() < 1e-6


@pytest.mark.parametrize("edited", [False, True])
def test_against_finite_differences(model, edited):
    locore = edit_with(Locore(PROMPT_LEN, 0.5, 3, range(3)))
    base = locore if edited else (lambda layer, weights: weights)
    scale = torch.ones(3, 4)
    scale[2, 1] = 1.7
    layer, candidate, step = 1, 9, 1e-5
    found = saliencies(model, TOKENS, [4, candidate], [layer], HISTORY, edit=base, scale=scale)
    weights = forward(model, TOKENS, base, scale)[0].weights[layer][0, :, -1].detach()
    expected = torch.zeros(len(TOKENS), dtype=torch.float64)
    for head in range(4):
        for key in range(len(TOKENS)):
            losses = []
            for sign in (1, -1):

                def moved(index, given, head=head, key=key, sign=sign):
                    given = base(index, given).clone()
                    if index == layer:
                        given[head, -1, key] += sign * step
                    return given

                logits = forward(model, TOKENS, moved, scale)[1][-1]
                losses.append(-torch.log_softmax(logits, -1)[candidate].item())
            slope = (losses[0] - losses[1]) / (2 * step)
            expected[key] += abs(float(weights[head, key]) * slope)
    expected /= expected.norm()
    assert torch.allclose(found.rows[0, 1], expected, rtol=1e-5, atol=1e-7)
    assert float(found.values[1]) == pytest.approx(float(expected[HISTORY].mean()), rel=1e-5)


def test_the_candidates_own_row_says_nothing(model):
    longer = [*TOKENS, 9]
    history = output_history(len(longer), PROMPT_LEN)
    own = saliencies(model, longer, [9], [0, 1, 2], history, row=-1, loss_row=-2)
    predicting = saliencies(model, longer, [9], [0, 1, 2], history, row=-2, loss_row=-2)
    assert torch.count_nonzero(own.rows) == 0
    assert bool((predicting.values > 0).all())
    shorter = saliencies(model, TOKENS, [9], [0, 1, 2], HISTORY)
    assert torch.allclose(predicting.rows[..., :-1], shorter.rows, atol=1e-6)


@pytest.mark.parametrize(
    ("order", "saliency", "accepted", "expected"),
    [
        ([7, 8], None, [], Decision(7, None, None, 1, 0, False)),
        ([7, 8], {7: 0.0, 8: 1.0}, [], Decision(7, 0.0, 0.0, 1, 0, False)),
        ([7, 8, 9], {7: 0.4, 8: 0.5, 9: 0.9}, [1.0], Decision(8, 0.5, 0.5, 2, 1, False)),
        ([7, 8, 9, 5], {7: 0.1, 8: 0.2, 9: 0.3, 5: 0.4}, [1.0], Decision(5, 0.4, 0.5, 3, 3, True)),
        ([7, 2], {7: 0.1, 2: 0.0}, [1.0], Decision(2, 0.0, 0.5, 2, 1, False)),  # an end token
        ([7, 8], {7: 0.6, 8: 0.1}, [9.0, *[1.0] * 5], Decision(7, 0.6, 0.5, 1, 0, False)),
    ],
)
def test_the_gate(order, saliency, accepted, expected):
    assert decide(order, saliency, accepted, alpha=0.5, end_tokens={2}) == expected
