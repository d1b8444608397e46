"""LocoRE in the real engine against edited attention matrices."""

from __future__ import annotations

import pytest

from tests.attention_oracle import Locore, Scale
from tests.engine.harness import Job, largest_difference, program

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
LAYERS = range(8, 14)  # 9 .. 14 of 32 layers, scaled to SmolLM2's 30

VARIANTS = [
    ({"beta": 1.0}, {"beta": 1.0, "layers": LAYERS}),
    ({"beta": 0.5, "window": 3, "layers": [0, 29]}, {"beta": 0.5, "window": 3, "layers": [0, 29]}),
    (
        {"beta": 2.0, "history": "any", "window": 4},
        {"beta": 2.0, "any_history": True, "window": 4, "layers": LAYERS},
    ),
    (
        {"beta": 0.4, "renormalize": False, "heads": [[5, 1], [12, 8]], "history": "any"},
        {"beta": 0.4, "renormalize": False, "heads": {(5, 1), (12, 8)}, "any_history": True},
    ),
    ({"beta": -0.9, "window": 2}, {"beta": -0.9, "window": 2, "layers": LAYERS}),
]


def test_logits_equal_the_oracle(harness, attention_oracle, prompts):
    """All variants and unsteered requests mixed in one batch; every output position."""
    jobs, edits = [], []
    for index, (options, oracle_options) in enumerate(VARIANTS):
        prompt = prompts[index]
        jobs.append(Job(prompt, program({"method": "locore", **options}), max_tokens=12))
        edits.append([Locore(len(prompt), **oracle_options)])
    jobs.append(Job(prompts[0], max_tokens=12))
    edits.append([])
    worst = largest_difference(harness, attention_oracle, jobs, edits)
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst <= TOLERANCE


def test_the_edit_matters_to_output_rows_and_not_to_prompt_rows(attention_oracle, prompts):
    prompt = prompts[3]
    tokens = prompt + [260, 284, 253, 1018, 28]
    plain = attention_oracle.logits(tokens)
    steered = attention_oracle.logits(tokens, [Locore(len(prompt), beta=1.0, layers=LAYERS)])
    difference = (steered - plain).abs().amax(-1)
    assert difference[: len(prompt)].max() < TOLERANCE / 10
    assert difference[-1] > 50 * TOLERANCE


def test_it_composes_with_vhr(harness, attention_oracle, prompts):
    heads = [[3, 1], [9, 0], [11, 7]]
    prompt = prompts[9]
    steered = program(
        {"method": "vhr", "heads": heads, "alpha": 1.5}, {"method": "locore", "beta": 0.8}
    )
    edits = [
        Locore(len(prompt), beta=0.8, layers=LAYERS),
        Scale({(layer, head) for layer, head in heads}, 1.5),
    ]
    jobs = [Job(prompt, steered, max_tokens=8), Job(prompt, max_tokens=8)]
    assert largest_difference(harness, attention_oracle, jobs, [edits, []]) <= TOLERANCE


def test_strength_zero_is_the_unsteered_answer(harness, prompts):
    zero = program({"method": "locore", "beta": 0.0})
    steered, plain = harness.run([Job(prompts[4], zero), Job(prompts[4])])
    assert steered == plain


def test_the_report_counts_output_positions(harness, prompts):
    job = Job(prompts[5], program({"method": "locore"}), max_tokens=6)
    harness.run([job])
    report = harness.runner.steering.pop_report(job.request.report_id)
    assert report.is_complete
    # The last token is sampled from the row of the one before; its own row is never computed.
    assert report.by_scope == {"output": 5}


def test_a_full_report_reads_class_masses(harness, attention_oracle, prompts):
    prompt = prompts[6]
    steered = program({"method": "locore", "heads": [[9, 2]], "window": 4}, report="full")
    job = Job(prompt, steered, max_tokens=6)
    tokens = harness.run([job])[0].tokens
    readings = harness.runner.steering.pop_report(job.request.report_id).readings
    ((layer, head, last, mean),) = readings["masses"]
    assert (layer, head) == (9, 2)
    seen = []

    def look(a, at):
        if at.index == 9:
            seen.append(a[2].clone())

    edit = Locore(len(prompt), window=4, heads={(9, 2)})
    attention_oracle.logits(prompt + tokens[:-1], [edit, look])
    rows = range(len(prompt), len(prompt) + 5)
    masses = [float(seen[0][row, max(len(prompt), row - 4) : row].sum()) for row in rows]
    assert last[1] == pytest.approx(masses[-1], abs=1e-5)
    assert mean[1] == pytest.approx(sum(masses) / 5, abs=1e-5)
