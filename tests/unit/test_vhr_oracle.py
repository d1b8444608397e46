"""The oracle of VHR's head selection against cases done by hand and scaled weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.vhr_oracle import VHROracle, choose

pytestmark = pytest.mark.unit

IMAGE = 60
IDS = [3, 7, *[IMAGE] * 4, 11, 12, 13, 14, 15]
LAYERS = [0, 1, 2]
PIXELS = torch.linspace(-2, 2, 3 * 8 * 8).view(1, 3, 8, 8)


def tiny(seed: int = 0) -> LlavaForConditionalGeneration:
    """3 layers of 4 heads over 2 KV heads; an image is 4 tokens."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_range=0.5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def oracle() -> VHROracle:
    return VHROracle(tiny())


def outputs(vhd: list[float], ta: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """z and z_text of heads of size 2 with these VHD and TA."""
    text = torch.tensor([[math.sqrt(value), 0.0] for value in ta])
    moved = torch.tensor([[0.0, value] for value in vhd])
    return text + moved, text


def test_heads_above_the_median_are_chosen():
    choice = choose(*outputs([5.0, 1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0, 1.0]))
    assert choice.vhd == pytest.approx([5, 1, 3, 2, 4])
    assert choice.ta == pytest.approx([1, 2, 1, 2, 1])
    assert choice.outliers == []
    assert choice.heads == [0, 4]  # the median, 3, is not above itself


def test_the_median_of_an_even_number_of_heads_is_the_lower_one():
    assert choose(*outputs([4.0, 2.0, 3.0, 1.0], [1.0] * 4)).heads == [0, 2]


def test_an_outlier_in_both_is_set_to_zero():
    """mean + std: 6 + 7.906 for VHD, 20.8 + 44.27 for TA; then the median of 0 1 2 3 4 is 2."""
    choice = choose(*outputs([1.0, 2.0, 3.0, 4.0, 20.0], [1.0, 1.0, 1.0, 1.0, 100.0]))
    assert (choice.outliers, choice.heads) == ([4], [2, 3])


@pytest.mark.parametrize("ta", [[1.0] * 5, [100.0, 1.0, 1.0, 1.0, 1.0]])
def test_an_outlier_in_vhd_alone_is_kept(ta):
    choice = choose(*outputs([1.0, 2.0, 3.0, 4.0, 20.0], ta))
    assert (choice.outliers, choice.heads) == ([], [3, 4])


def test_an_outlier_in_ta_alone_is_kept():
    choice = choose(*outputs([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 100.0, 1.0]))
    assert (choice.outliers, choice.heads) == ([], [3, 4])


def test_the_standard_deviation_is_the_unbiased_one():
    """VHD 3.2 lies 1.15 above the mean; std is 1.215, and 1.052 with n in place of n - 1."""
    choice = choose(*outputs([1.0, 1.0, 3.0, 3.2], [1.0, 1.0, 1.0, 100.0]))
    assert (choice.outliers, choice.heads) == ([], [2, 3])


def test_margin_is_the_distance_to_the_median():
    choice = choose(*outputs([5.0, 1.0, 3.0, 2.0, 3.003], [1.0, 1.0, 1.0, 1.0, 1.5]))
    assert choice.margin == pytest.approx(0.001, rel=1e-3)
    assert choose(*outputs([5.0, 3.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.5])).margin == 0


def test_margin_is_the_distance_to_becoming_an_outlier():
    """TA of the last head is far above its limit, and its VHD just below its own."""
    vhd, ta = [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0, 100.0]
    low, high = 4.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        choice = choose(*outputs([*vhd, middle], ta))
        low, high = (low, middle) if choice.outliers else (middle, high)
    near = choose(*outputs([*vhd, low * 0.999], ta))
    assert near.outliers == [] and near.margin < 0.001
    # Where its TA is far below, it cannot become one.
    assert choose(*outputs([*vhd, low * 0.999], [100.0, 1.0, 1.0, 1.0, 1.0])).margin > 0.1


def test_no_image_effect_selects_nothing():
    z = torch.randn(4, 8)
    assert choose(z, z).heads == []


def test_a_layer_that_the_image_does_not_reach_selects_nothing():
    model = tiny()
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.v_proj.weight.zero_()
    chosen = VHROracle(model).select(IDS, PIXELS, LAYERS, 2.0)
    assert chosen[1] == []
    assert chosen[0] and chosen[2]


def test_layers_driven_one_by_one_are_the_model(oracle):
    """z of the last layer, and so all before it, equals that of transformers' own forward."""
    choices = oracle.vhd(IDS, PIXELS, LAYERS, 1.0)
    assert len(choices) == 3
    with_image, without = last_z(oracle, IDS, []), last_z(oracle, text_only(IDS), [])
    for layer, choice in enumerate(choices):
        expected = choose(with_image[layer], without[layer])
        assert choice.vhd == pytest.approx(expected.vhd, rel=1e-4)
        assert choice.ta == pytest.approx(expected.ta, rel=1e-4)


def text_only(ids: list[int]) -> list[int]:
    return [token for token in ids if token != IMAGE]


def last_z(oracle: VHROracle, ids: list[int], heads, alpha: float = 1.0) -> dict:
    """z at the last position by layer, from transformers' forward."""
    with oracle.scaled_heads(heads, alpha) as z:
        oracle.logits(ids, PIXELS if IMAGE in ids else None)
    return {layer: values[-1] for layer, values in z.items()}


def weights_scaled(heads, alpha: float) -> VHROracle:
    """The tiny model with its heads scaled in the weights of the output projection."""
    model = copy.deepcopy(tiny())
    for layer, head in heads:
        weight = model.model.language_model.layers[layer].self_attn.o_proj.weight
        with torch.no_grad():
            weight[:, 8 * head : 8 * (head + 1)] *= alpha
    return VHROracle(model)


def test_scaled_heads_are_scaled_weights(oracle):
    heads = [[0, 1], [1, 0], [1, 3], [2, 2]]
    expected = weights_scaled(heads, 1.7).logits(IDS, PIXELS)
    assert torch.allclose(oracle.logits(IDS, PIXELS, heads, 1.7), expected, atol=1e-5)
    assert (expected - oracle.logits(IDS, PIXELS)).abs().max() > 0.1


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2]])
def test_selection_equals_whole_forwards_with_the_heads_chosen_so_far(oracle, baseline, layers):
    """Layer by layer with models whose weights are scaled."""
    plain = VHROracle(tiny())
    heads: list[tuple[int, int]] = []
    expected = {}
    for layer in layers:
        reinforced = weights_scaled(heads, 3.0)
        text_model = reinforced if baseline else plain
        z = last_z(reinforced, IDS, [])[layer]
        expected[layer] = choose(z, last_z(text_model, text_only(IDS), [])[layer])
        heads += [(layer, head) for head in expected[layer].heads]
    choices = oracle.vhd(IDS, PIXELS, layers, 3.0, baseline)
    for layer in layers:
        assert choices[layer].vhd == pytest.approx(expected[layer].vhd, rel=1e-4)
        assert choices[layer].heads == expected[layer].heads
    chosen = oracle.select(IDS, PIXELS, layers, 3.0, baseline)
    assert chosen == {layer: expected[layer].heads for layer in layers}


def test_a_reinforced_baseline_moves_later_layers_only(oracle):
    raw = oracle.vhd(IDS, PIXELS, [0, 1], 3.0)
    both = oracle.vhd(IDS, PIXELS, [0, 1], 3.0, reinforce_baseline=True)
    assert raw[0] == both[0]
    assert raw[1].vhd != pytest.approx(both[1].vhd, rel=1e-2)
    assert raw[1].ta != pytest.approx(both[1].ta, rel=1e-2)


def test_a_reinforced_baseline_can_choose_other_heads():
    differs = [
        VHROracle(tiny(seed)).select(IDS, PIXELS, LAYERS, 3.0)
        != VHROracle(tiny(seed)).select(IDS, PIXELS, LAYERS, 3.0, reinforce_baseline=True)
        for seed in range(4)
    ]
    assert any(differs)


def test_alpha_one_leaves_the_logits(oracle):
    heads = [(layer, head) for layer in LAYERS for head in range(4)]
    plain = oracle.model(input_ids=torch.tensor([IDS]), pixel_values=PIXELS).logits[0]
    assert torch.equal(oracle.logits(IDS, PIXELS, heads, 1.0), plain)
    raw = oracle.select(IDS, PIXELS, LAYERS, 1.0)
    assert raw == oracle.select(IDS, PIXELS, LAYERS, 1.0, reinforce_baseline=True)


def test_generate_is_greedy_with_the_heads_frozen(oracle):
    heads = [[0, 2], [2, 1]]
    tokens = oracle.generate(IDS, PIXELS, heads, 2.5, 6)
    logits = weights_scaled(heads, 2.5).logits(IDS + tokens[:-1], PIXELS)
    assert tokens == logits[-6:].argmax(-1).tolist()
    assert tokens != oracle.generate(IDS, PIXELS, [], 2.5, 6)
