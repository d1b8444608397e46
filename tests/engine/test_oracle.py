"""Steered logits of the real engine against the independent oracle."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engine.harness import GEOMETRY, Job, affine_program
from tests.oracle import HeadEdit

pytestmark = pytest.mark.engine

NUM_PROGRAMS = 10
TOLERANCE = 1e-3


def draw_edits(seed: int) -> list[HeadEdit]:
    """A random program: 1 to 40 heads, scales in [0, 2.5], every third one with shifts."""
    rng = random.Random(seed)
    heads = [(layer, head) for layer in range(GEOMETRY.num_layers) for head in range(9)]
    edits: list[HeadEdit] = []
    for layer, head in rng.sample(heads, rng.randint(1, 40)):
        shift = None
        if seed % 3 == 2:
            shift = [rng.gauss(0, 0.05) for _ in range(GEOMETRY.head_size)]
        edits.append((layer, head, rng.choice([0.0, rng.uniform(0, 2.5)]), shift))
    return edits


DRAWN = [draw_edits(seed) for seed in range(NUM_PROGRAMS)]


@pytest.mark.parametrize("offset", [0, 5])
def test_steered_logits_equal_the_oracle(harness, oracle, prompts, offset):
    """Every prompt with a program of its own, mixed in one batch; prompt and output positions."""
    edits = [DRAWN[(index + offset) % NUM_PROGRAMS] for index in range(len(prompts))]
    jobs = [
        Job(prompt, affine_program(edit), max_tokens=3)
        for prompt, edit in zip(prompts, edits, strict=True)
    ]
    jobs.append(Job(prompts[0], max_tokens=3))
    edits.append([])
    worst = 0.0
    for job, edit, rows in zip(jobs, edits, harness.record_logits(jobs), strict=True):
        logits = torch.stack(rows)
        tokens = [int(row.argmax()) for row in rows]
        expected = oracle.logits(job.prompt + tokens[:-1], edit)[-len(tokens) :]
        worst = max(worst, float((logits - expected).abs().max()))
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst <= TOLERANCE


def test_the_drawn_programs_matter(oracle, prompts):
    """The oracle itself tells steered from unsteered, so the test above can fail."""
    base = oracle.logits(prompts[0])[-1]
    for edits in DRAWN:
        assert float((oracle.logits(prompts[0], edits)[-1] - base).abs().max()) > 50 * TOLERANCE
