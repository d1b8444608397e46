"""The three things called masking a head, in the real engine against edited attention matrices."""

from __future__ import annotations

import pytest

from tests.attention_oracle import Identity, Scale, Uniform
from tests.engine.harness import Job, largest_difference, program

pytestmark = pytest.mark.engine

HEADS = [[2, 0], [9, 4], [9, 5], [20, 8]]
PAIRS = {(layer, head) for layer, head in HEADS}


def test_logits_equal_the_oracle(harness, attention_oracle, prompts):
    variants = [
        ({"mode": "zero"}, Scale(PAIRS, 0.0)),
        ({"mode": "uniform"}, Uniform(PAIRS)),
        ({"mode": "identity"}, Identity(PAIRS)),
        ({"mode": "identity", "u": 0.3}, Identity(PAIRS, 0.3)),
    ]
    jobs = [
        Job(prompt, program({"method": "head_ablation", "heads": HEADS, **mode}), max_tokens=4)
        for prompt, (mode, _) in zip(prompts, variants, strict=False)
    ]
    worst = largest_difference(harness, attention_oracle, jobs, [[edit] for _, edit in variants])
    assert worst <= 1e-3


def test_the_modes_are_different_edits(attention_oracle, prompts):
    edits = [Scale(PAIRS, 0.0), Uniform(PAIRS), Identity(PAIRS), Identity(PAIRS, 0.3)]
    logits = [attention_oracle.logits(prompts[0], [edit])[-1] for edit in edits]
    for index, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.05 for other in logits[:index])
