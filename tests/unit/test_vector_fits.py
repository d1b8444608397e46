"""The mathematics of `headway calibrate gact`, `caa` and `act`, on planted activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headway.server.calibration import act, caa, gact, gact_report, probes
from headway.server.calibration.activations import PairRows
from headway.server.calibration.held_out import bootstrap_mean, check_clusters, fold_numbers, wilson
from headway.steering import ModelGeometry
from headway.steering.vectors import VectorHeader, VectorProfile

pytestmark = pytest.mark.unit

PAIRS, LAYERS, HIDDEN, CLUSTERS = 60, 3, 32, 3
GEOMETRY = ModelGeometry(LAYERS, 4, 2, 8, HIDDEN, architecture="LlamaForCausalLM")
FOLDS = np.arange(PAIRS) % 5


def header(kind: str, **found: object) -> VectorHeader:
    return VectorHeader(
        kind=kind,
        version=1,
        fingerprint=GEOMETRY.fingerprint,
        architecture=GEOMETRY.architecture,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        **found,
    )


class Planted:
    """Prompts of three kinds, each with a direction of its own.

    prompts: layer 0 tells the kind not at all, layer 1 does so under a scale that varies from
    prompt to prompt, layer 2 plainly. differences: the direction of the kind, and noise.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        normal = generator.standard_normal
        self.kinds = generator.permutation(np.repeat(np.arange(CLUSTERS), (26, 20, 14)))
        q, _ = np.linalg.qr(normal((HIDDEN, 2 * CLUSTERS)))
        self.directions, marks = q.T[:CLUSTERS], q.T[CLUSTERS:]
        noise = normal((PAIRS, LAYERS, HIDDEN)) * 0.1
        self.differences = (3 * self.directions[self.kinds][:, None] + noise).astype(np.float32)
        self.prompts = normal((PAIRS, LAYERS, HIDDEN)).astype(np.float32)
        self.prompts[:, 1:] += 12 * marks[self.kinds][:, None]
        self.prompts[:, 1] *= np.exp(2 * normal((PAIRS, 1)))


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


@pytest.fixture(scope="module")
def judged(planted: Planted) -> gact.HeldOut:
    return gact.evaluate(planted.prompts, planted.differences, FOLDS, CLUSTERS, seed=0)


# What is held out


def test_prompts_are_dealt_to_folds_topic_by_topic() -> None:
    prompts = [f"p{index}" for index in range(20)]
    topics = ["a"] * 10 + ["b"] * 10
    folds = fold_numbers(prompts, topics, 5, seed=3)
    for half in (folds[:10], folds[10:]):
        assert np.bincount(half).tolist() == [2] * 5
    np.testing.assert_array_equal(folds, fold_numbers(prompts, topics, 5, seed=3))
    assert (folds != fold_numbers(prompts, topics, 5, seed=4)).any()


def test_equal_prompts_are_held_out_together() -> None:
    folds = fold_numbers(["a", "b", "a", "c", "b", "d"], [""] * 6, 2, seed=0)
    assert folds[0] == folds[2]
    assert folds[1] == folds[4]
    with pytest.raises(ValueError, match="2 different prompts are too few for 3 folds"):
        fold_numbers(["a", "b", "a"], [""] * 3, 3, seed=0)


def test_intervals() -> None:
    found = wilson(np.array([True] * 9 + [False]))
    assert found.rounded() == {"value": 0.9, "low": 0.595850, "high": 0.982124}
    assert wilson(np.ones(10, bool)).rounded() == {"value": 1.0, "low": 0.722467, "high": 1.0}
    values = np.random.default_rng(0).standard_normal(400) + 5
    drawn = bootstrap_mean(values, seed=0)
    half = 1.96 * values.std() / 20
    assert drawn.value == pytest.approx(values.mean())
    assert drawn.low == pytest.approx(values.mean() - half, abs=0.01)
    assert drawn.high == pytest.approx(values.mean() + half, abs=0.01)


# Differences and clusters


def test_a_difference_is_the_wanted_less_the_mean_of_the_unwanted() -> None:
    targets = np.full((2, 1, 3), 5.0, np.float32)
    others = (np.array([[[1, 2, 3]], [[3, 2, 1]]], np.float32), np.zeros((1, 1, 3), np.float32))
    found = PairRows(targets, targets, others).differences
    np.testing.assert_allclose(found, [[[3, 3, 3]], [[5, 5, 5]]])


def test_planted_directions_are_found_largest_cluster_first(planted: Planted) -> None:
    found = gact.cluster(planted.differences[:, 0], CLUSTERS, seed=0)
    assert found.sizes == [26, 20, 14]
    np.testing.assert_array_equal(found.labels, planted.kinds)
    np.testing.assert_allclose(np.linalg.norm(found.directions, axis=1), 1)
    cosines = np.sum(found.directions * planted.directions, axis=1)
    assert cosines.min() > 0.99
    np.testing.assert_array_equal(found.nearest(planted.differences[:, 1]), planted.kinds)


def test_continuations_that_change_nothing_have_no_direction() -> None:
    with pytest.raises(ValueError, match="the same residual stream"):
        gact.cluster(np.zeros((8, HIDDEN)), 1, seed=0)


def test_too_many_clusters_for_the_prompts() -> None:
    check_clusters(np.arange(8) % 5, 3)
    with pytest.raises(ValueError, match="4 clusters of 6 prompts"):
        check_clusters(np.arange(8) % 5, 4)


# Probes


def test_a_probe_is_what_the_engine_computes(planted: Planted) -> None:
    import torch

    from headway.kernels.residual_edit import residual_edit_reference

    fit = gact.fit_layer(planted.prompts[:, 1], planted.differences[:, 1], CLUSTERS, seed=0)
    probe = probes.Probe(fit.probe_weights.astype(float), fit.probe_bias.astype(float))
    rows = planted.prompts[:, 1]
    told = probe.predict(probes.normalized(rows))
    np.testing.assert_array_equal(told, planted.kinds)
    tensors = map(torch.from_numpy, (fit.probe_weights, fit.probe_bias, fit.directions))
    added = residual_edit_reference(torch.from_numpy(rows), 1.0, *tensors).numpy()
    rms = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(added, rms * fit.directions[told], rtol=1e-4, atol=1e-4)


def test_refinement_lowers_the_cross_entropy_where_it_is_fitted(planted: Planted) -> None:
    rows = probes.normalized(planted.prompts[:, 2])
    start = probes.fit_probe(rows, planted.kinds, CLUSTERS)
    path = list(probes.refinement(start, rows, planted.kinds, 10, seed=0))
    losses = [probe.cross_entropy(rows, planted.kinds) for probe in path]
    assert path[0] is start
    assert max(losses[1:]) < losses[0]
    again, epochs = probes.refine(rows, planted.kinds, CLUSTERS, seed=0)
    assert 0 < epochs <= probes.MAX_EPOCHS
    other, _ = probes.refine(rows, planted.kinds, CLUSTERS, seed=0)
    np.testing.assert_array_equal(again.weights, other.weights)


def test_a_step_follows_the_gradient_of_the_cross_entropy(planted: Planted) -> None:
    rows, kinds = probes.normalized(planted.prompts[:8, 2]), planted.kinds[:8]
    rows = probes.Scale.of(rows).apply(rows)  # the space that the steps are taken in
    start = probes.Probe(np.zeros((CLUSTERS, HIDDEN)), np.zeros(CLUSTERS))
    _, moved = probes.refinement(start, rows, kinds, 1, seed=0)
    tiny = 1e-6
    for cluster in range(CLUSTERS):
        nudged = start.bias.copy()
        nudged[cluster] += tiny
        higher = probes.Probe(start.weights, nudged).cross_entropy(rows, kinds)
        slope = (higher - start.cross_entropy(rows, kinds)) / tiny
        # The first step of Adam is as long as the learning rate, downhill.
        expected = -probes.STEP * np.sign(slope)
        assert moved.bias[cluster] - start.bias[cluster] == pytest.approx(expected, rel=1e-3)


def test_a_probe_is_the_same_in_the_space_it_was_fitted_in(planted: Planted) -> None:
    rows = probes.normalized(planted.prompts[:, 1])
    scale = probes.Scale.of(rows)
    inner = scale.apply(rows)
    assert np.square(inner).sum(axis=1).mean() == pytest.approx(1)
    np.testing.assert_allclose(inner.mean(axis=0), 0, atol=1e-12)
    probe = probes.fit_probe(rows, planted.kinds, CLUSTERS)
    np.testing.assert_allclose(scale.unfold(probe).logits(inner), probe.logits(rows), atol=1e-9)
    np.testing.assert_allclose(scale.fold(scale.unfold(probe)).bias, probe.bias, atol=1e-9)


@pytest.mark.parametrize("seen", [(1,), (0, 2), (0, 1, 2)])
def test_clusters_that_no_training_prompt_is_in(planted: Planted, seen: tuple[int, ...]) -> None:
    inside = np.isin(planted.kinds, seen)
    rows = probes.normalized(planted.prompts[inside, 2])
    probe = probes.fit_probe(rows, planted.kinds[inside], CLUSTERS)
    np.testing.assert_array_equal(probe.predict(rows), planted.kinds[inside])
    assert np.isfinite(probe.bias).all()


def test_rows_of_zeros_can_be_read() -> None:
    np.testing.assert_array_equal(probes.normalized(np.zeros((2, 4), np.float32)), 0)


# G-ACT as a whole


def test_held_out_accuracy_by_layer(judged: gact.HeldOut) -> None:
    np.testing.assert_allclose(judged.majority.mean(axis=1), 26 / PAIRS)
    refined = judged.refined.mean(axis=1)
    assert refined[0] < 0.55
    assert refined[1] > 0.9
    assert refined[2] > 0.95
    assert judged.separated[1:].mean() > 0.95
    # Where prompts differ in scale, probes of the raw stream lose; the normed ones do not.
    assert judged.act.mean(axis=1)[1] < refined[1]


def test_layers_are_chosen_by_what_probes_tell(judged: gact.HeldOut) -> None:
    assert set(gact.choose_layers(judged, 2)) == {1, 2}
    assert len(gact.choose_layers(judged, 1)) == 1
    nothing = gact.HeldOut(*(np.repeat(judged.majority, 1, axis=0) for _ in range(5)))
    assert gact.choose_layers(nothing, 2) == ()
    assert "in layer 0, against 0.43" in gact.explain_none(nothing)


def test_one_cluster_has_nothing_to_tell(planted: Planted, tmp_path: Path) -> None:
    alike = planted.differences + 4 * planted.directions[0].astype(np.float32)
    found = gact.evaluate(planted.prompts, alike, FOLDS, 1, seed=0)
    assert found.majority.all() and found.refined.all() and found.act.all()
    assert gact.choose_layers(found, 2) == (0, 1)
    fit = gact.fit_layer(planted.prompts[:, 0], alike[:, 0], 1, seed=0)
    assert not fit.probe_weights.any() and not fit.probe_bias.any()
    profile = gact.make_profile(header("gact", layers=(0,)), [fit])
    assert profile.num_clusters == 1


def test_a_profile_holds_what_was_planted(planted: Planted, tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        fits = [
            gact.fit_layer(planted.prompts[:, layer], planted.differences[:, layer], CLUSTERS, 0)
            for layer in (1, 2)
        ]
        path = tmp_path / name
        gact.make_profile(header("gact", layers=(1, 2)), fits).save(path)
        files.append(path)
    assert files[0].read_bytes() == files[1].read_bytes()
    profile = VectorProfile.load(files[0])
    profile.check_model(GEOMETRY)
    assert profile.tensors["directions"].shape == (2, CLUSTERS, HIDDEN)
    cosines = np.einsum("lkh,kh->lk", profile.tensors["directions"], planted.directions)
    assert cosines.min() > 0.99


def test_the_report_tells_measured_from_published(judged: gact.HeldOut) -> None:
    sizes = [[26, 20, 14]] * LAYERS
    found = gact_report.report(judged, sizes, seed=0)
    assert [each["layer"] for each in found["layers"]] == [0, 1, 2]
    assert found["layers"][1]["refined"]["value"] == pytest.approx(judged.refined[1].mean())
    means = found["means"]["all layers"]
    gain = means["refined"]["value"] - means["act"]["value"]
    assert means["refined - act"]["value"] == pytest.approx(gain, abs=1e-5)
    assert means["refined - act"]["low"] < gain < means["refined - act"]["high"]
    early = found["means"]["first fifth"]["act"]["value"]
    assert early == pytest.approx(judged.act[0].mean())
    assert "not measured here" in found["published"]["source"]
    lines = gact_report.table(judged, sizes, (1,)).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "*1", "2"]
    assert "+61.5 % over ACT" in gact_report.summary(judged, seed=0)


@pytest.mark.parametrize(("num_layers", "expected"), [(30, 6), (28, 6), (3, 1)])
def test_the_first_fifth(num_layers: int, expected: int) -> None:
    assert gact_report.first_fifth(num_layers) == range(expected)


# CAA


def test_the_direction_of_caa_is_the_mean_difference(planted: Planted, tmp_path: Path) -> None:
    profile = caa.make_profile(header("caa", layers=(0, 2)), planted.differences)
    expected = planted.differences.mean(axis=0)[[0, 2]]
    np.testing.assert_allclose(profile.tensors["directions"][:, 0], expected, rtol=1e-5, atol=1e-6)
    unit = caa.make_profile(header("caa", layers=(0, 2)), planted.differences, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit.tensors["directions"], axis=2), 1, rtol=1e-6)
    profile.save(tmp_path / "caa")
    VectorProfile.load(tmp_path / "caa").check_model(GEOMETRY)
    with pytest.raises(ValueError, match="the same residual stream"):
        caa.make_profile(header("caa", layers=(0,)), np.zeros((8, LAYERS, HIDDEN)), normalize=True)


def test_the_layer_of_caa_is_the_one_of_the_middle_that_separates_best() -> None:
    assert list(caa.middle_third(30)) == list(range(10, 20))
    assert list(caa.middle_third(2)) == [0, 1]
    assert list(caa.middle_third(1)) == [0]
    generator = np.random.default_rng(0)
    differences = generator.standard_normal((PAIRS, 6, HIDDEN))
    differences[:, :, 0] += np.array([9, 9, 1, 3, 9, 9])
    found = caa.separation(differences, FOLDS)
    assert caa.choose_layer(found) == (3,)
    assert found.separated[3].mean() > 0.95 > found.separated[2].mean()
    assert "*3" in caa.table(found, np.ones(6), (3,))


# Heads


def texts_with(telling: tuple[int, int], seed: int = 0) -> act.Texts:
    """Two unwanted texts a pair; one head's outputs tell them from the wanted ones."""
    generator = np.random.default_rng(seed)
    targets = generator.standard_normal((20, 2, 4 * 8))
    others = generator.standard_normal((20, 2, 2, 4 * 8))
    layer, head = telling
    targets[:, layer, head * 8 + 3] += 3
    others[:, :, layer, head * 8 + 3] -= 3
    return act.head_texts(PairRows(targets, targets, tuple(others)), num_heads=4)


def test_the_head_that_tells_is_chosen() -> None:
    texts = texts_with((1, 2))
    assert texts.outputs.shape == (60, 2, 4, 8)
    assert texts.wanted.sum() == 20
    accuracy = act.head_accuracy(texts, np.arange(20) % 5)
    assert act.choose_heads(accuracy, 1) == ((1, 2),)
    assert accuracy[1, 2] > 0.95
    assert np.delete(accuracy.flatten(), 6).max() < 0.8
    assert "2 (" in act.table(accuracy, ((1, 2),))
    assert list(act.choose_heads(accuracy, 3)) == sorted(act.choose_heads(accuracy, 3))


def test_no_head_is_chosen_at_chance() -> None:
    flat = np.full((2, 4), 0.5)
    assert act.choose_heads(flat, 3) == ()
    assert "at best 0.50" in act.explain_none(flat)


def test_a_shift_is_one_standard_deviation_towards_the_wanted() -> None:
    texts = texts_with((1, 2))
    z = texts.outputs[:, 1, 2]
    shift = act.head_shift(z, texts.wanted)
    along = z @ (shift / np.linalg.norm(shift))
    assert np.linalg.norm(shift) == pytest.approx(along.std())
    assert along[texts.wanted].mean() > along[~texts.wanted].mean()
    assert shift[3] / np.linalg.norm(shift) > 0.9
    profile = act.make_profile(header("act", heads=((1, 2),)), texts)
    np.testing.assert_allclose(profile.tensors["shifts"][0], shift, rtol=1e-5)
    profile.check_model(GEOMETRY)
    with pytest.raises(ValueError, match="the same for all texts"):
        act.head_shift(np.ones((60, 8)), texts.wanted)
