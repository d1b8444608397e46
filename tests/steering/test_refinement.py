"""Feedback as gradient steps on probes: against autograd, and what it does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from headway.steering import ModelGeometry
from headway.steering.program import ResidualSite
from headway.steering.refinement import Feedback, ProbeReading, refined, same_clusters
from headway.steering.vectors import FeedbackRule, VectorProfile
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(4, 4, 2, 8, 32, architecture="LlamaForCausalLM")
RATE = 0.3


def profile(**options: Any) -> VectorProfile:
    """Drawn; with probes that are not sure of anything."""
    drawn = drawn_profile(GEOMETRY, feedback=FeedbackRule(), **options)
    weights = drawn.tensors["probe_weights"] / np.float32(GEOMETRY.hidden_size**0.5)
    return VectorProfile(drawn.header, {**drawn.tensors, "probe_weights": weights})


def logits(made: VectorProfile, index: int, row: np.ndarray) -> np.ndarray:
    weights, bias = made.tensors["probe_weights"][index], made.tensors["probe_bias"][index]
    return weights.astype(np.float64) @ row + bias


def drawn_reading(made: VectorProfile, seed: int = 0) -> ProbeReading:
    """Rows of rms 1 at all layers, and what the probes pick for them."""
    count = len(made.header.layers)
    rows = np.random.default_rng(seed).standard_normal((count, made.header.hidden_size))
    rows = (rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True))).astype(np.float32)
    picked = tuple(int(logits(made, at, row).argmax()) for at, row in enumerate(rows))
    return ProbeReading(made.header.layers, rows, picked)


def likely(label: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda z: -torch.log_softmax(z, 0)[label]


def unlikely(cluster: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda z: -torch.log(1 - torch.softmax(z, 0)[cluster])


def descend(
    made: VectorProfile, index: int, row: np.ndarray, loss: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """A step of gradient descent on the weights for rows of unit length, and on the bias."""
    size = np.sqrt(len(row))
    scaled = torch.tensor(made.tensors["probe_weights"][index] * size, dtype=torch.float64)
    bias = torch.tensor(made.tensors["probe_bias"][index], dtype=torch.float64)
    for parameter in (scaled, bias):
        parameter.requires_grad_()
    loss(scaled @ torch.tensor(row / size, dtype=torch.float64) + bias).backward()
    assert scaled.grad is not None and bias.grad is not None
    with torch.no_grad():
        new = (scaled - RATE * scaled.grad) / size, bias - RATE * bias.grad
    return new[0].numpy(), new[1].numpy()


@pytest.mark.parametrize("verdict", [{"label": 1}, {"preferred": True}, {"preferred": False}])
@pytest.mark.parametrize("num_clusters", [2, 3, 16])
def test_a_step_is_that_of_autograd(num_clusters: int, verdict: dict[str, Any]) -> None:
    before = profile(num_clusters=num_clusters)
    reading = drawn_reading(before)
    after = refined(before, [Feedback(reading, **verdict)], RATE)
    for index, (row, picked) in enumerate(zip(reading.rows, reading.clusters, strict=True)):
        away = verdict.get("preferred") is False
        loss = unlikely(picked) if away else likely(verdict.get("label", picked))
        weights, bias = descend(before, index, row.astype(np.float64), loss)
        np.testing.assert_allclose(after.tensors["probe_weights"][index], weights, atol=1e-6)
        np.testing.assert_allclose(after.tensors["probe_bias"][index], bias, atol=1e-6)
        assert not np.allclose(before.tensors["probe_bias"][index], bias, atol=1e-6)


def test_steps_follow_one_another() -> None:
    start = profile()
    feedback = [Feedback(drawn_reading(start, seed), label=seed % 3) for seed in range(4)]
    at_once, one_by_one = refined(start, feedback, RATE), start
    for each in feedback:
        one_by_one = refined(one_by_one, [each], RATE)
    backwards = refined(start, feedback[::-1], RATE)
    for name in ("probe_weights", "probe_bias"):
        np.testing.assert_allclose(at_once.tensors[name], one_by_one.tensors[name], atol=1e-6)
        assert not np.allclose(at_once.tensors[name], backwards.tensors[name], atol=1e-6)


def test_a_probe_learns_the_label_that_feedback_plants() -> None:
    """Prompts are told apart by one direction of the stream, of which the first probe is unaware.

    The label of a prompt is told by the sign; held-out prompts follow it after the feedback.
    """
    made = profile(layers=(1,), num_clusters=2)
    draw = np.random.default_rng(5)
    planted = np.zeros(32)
    planted[7] = 8.0

    def reading(label: int) -> ProbeReading:
        x = draw.standard_normal(32) + planted * (2 * label - 1)
        row = (x / np.sqrt(np.mean(x**2)))[None].astype(np.float32)
        return ProbeReading((1,), row, (int(logits(made, 0, row[0]).argmax()),))

    def accuracy(probe: VectorProfile) -> float:
        held_out = [(label, reading(label).rows[0]) for label in (0, 1) * 50]
        return float(np.mean([logits(probe, 0, row).argmax() == label for label, row in held_out]))

    feedback = [Feedback(reading(label), label=label) for label in (0, 1) * 40]
    assert accuracy(made) < 0.8
    assert accuracy(refined(made, feedback, 1.0)) == 1.0


@pytest.mark.parametrize("preferred", [True, False])
def test_the_picked_cluster_becomes_likelier_or_less_likely(preferred: bool) -> None:
    before = profile()
    reading = drawn_reading(before)
    after = refined(before, [Feedback(reading, preferred=preferred)], RATE)
    for index, (row, picked) in enumerate(zip(reading.rows, reading.clusters, strict=True)):
        was, now = (
            torch.softmax(torch.tensor(logits(each, index, row)), 0)[picked].item()
            for each in (before, after)
        )
        assert now > was if preferred else now < was


def test_a_probe_that_is_certain_can_still_be_told_that_it_is_wrong() -> None:
    sure = profile(num_clusters=2)
    sure.tensors["probe_bias"][:, 0] += 1000.0
    reading = drawn_reading(sure)
    assert set(reading.clusters) == {0}
    after = refined(sure, [Feedback(reading, preferred=False)], RATE)
    step = after.tensors["probe_bias"] - sure.tensors["probe_bias"]
    np.testing.assert_allclose(step, [[-RATE, RATE]] * 2, atol=1e-3)


def test_only_layers_that_were_read_and_only_probes_change() -> None:
    before = profile(layers=(0, 2, 3))
    whole = drawn_reading(before)
    reading = ProbeReading((2,), whole.rows[1:2], whole.clusters[1:2])
    before.header.training["folds"] = 5
    after = refined(
        before, [Feedback(reading, label=0)], RATE, {"refined_from": "p@1", "feedback": 1}
    )
    for name in ("probe_weights", "probe_bias"):
        same = (before.tensors[name] == after.tensors[name]).reshape(3, -1).all(axis=1)
        assert same.tolist() == [True, False, True]
    assert after.header.training == {"folds": 5, "refined_from": "p@1", "feedback": 1}
    assert before.header.training == {"folds": 5}
    assert after.header.model_copy(update={"training": {}}) == before.header.model_copy(
        update={"training": {}}
    )
    assert same_clusters(before, after)
    with pytest.raises(ValueError, match="not in tuple"):
        refined(before, [Feedback(ProbeReading((1,), whole.rows[:1], (0,)), label=0)], RATE)


def test_other_directions_mean_other_clusters() -> None:
    one = profile()
    for other in (profile(seed=1), profile(layers=(1, 3)), profile(num_clusters=2)):
        assert not same_clusters(one, other)
    assert not same_clusters(one, profile(site=ResidualSite.BLOCK_INPUT))
    assert same_clusters(one, profile(strength=2.0))


def test_the_same_feedback_gives_the_same_file(tmp_path: Any) -> None:
    start = profile()
    feedback = [Feedback(drawn_reading(start, seed), preferred=bool(seed % 2)) for seed in range(9)]
    digests = {refined(start, feedback, RATE).save(tmp_path / str(run)) for run in range(3)}
    assert len(digests) == 1
