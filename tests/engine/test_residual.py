"""Residual edits in the real engine against the formula on a transformers model."""

from __future__ import annotations

import pytest
import torch

from headway.steering.artifacts import encode_artifact
from headway.steering.program import QueryScope, ResidualEdit, ResidualForm, ResidualSite
from tests.engine.harness import GEOMETRY, Job
from tests.residual import Added, drawn_artifact, residual_program

pytestmark = pytest.mark.engine

FIRST, SECOND = (drawn_artifact(seed, GEOMETRY.hidden_size) for seed in (1, 2))
MANY = [drawn_artifact(seed, GEOMETRY.hidden_size, 1 + seed % 16) for seed in range(8)]
ALL, OUTPUT = QueryScope.ALL, QueryScope.OUTPUT
INSIDE, BEHIND = ResidualSite.AFTER_ATTENTION, ResidualSite.BLOCK_OUTPUT
VARIANTS = [
    (ResidualEdit(12, FIRST.digest, 0.8),),
    (ResidualEdit(5, FIRST.digest, 0.5, ALL), ResidualEdit(20, SECOND.digest, -0.7)),
    (ResidualEdit(9, SECOND.digest, 0.6, ALL, cluster=2),),
    (),
    (
        ResidualEdit(3, SECOND.digest, 0.5, OUTPUT, site=INSIDE),
        ResidualEdit(3, FIRST.digest, 0.4, OUTPUT, site=BEHIND),
        ResidualEdit(29, FIRST.digest, 0.5, site=BEHIND),
    ),
    (ResidualEdit(15, FIRST.digest, 4.0, ALL, cluster=1, site=BEHIND, form=ResidualForm.ADD),),
    (ResidualEdit(15, SECOND.digest, 1.0, ALL, site=INSIDE, form=ResidualForm.REMOVE),),
]
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def loaded(harness):
    worker = harness.core.model_executor.driver_worker.worker
    digests = [artifact.digest for artifact in (FIRST, SECOND, *MANY)]
    wires = [encode_artifact(artifact) for artifact in (FIRST, SECOND, *MANY)]
    assert worker.headway_load_artifacts(wires) == digests
    yield harness
    assert worker.headway_unload_artifacts(digests) == len(set(digests))


def jobs(prompts) -> list[Job]:
    programs = [residual_program(*edits) if edits else None for edits in VARIANTS]
    return [
        Job(prompt, steered, MAX_TOKENS) for prompt, steered in zip(prompts, programs, strict=False)
    ]


def test_logits_equal_the_oracle(loaded, attention_oracle, prompts):
    """All variants and an unsteered request in one batch; every output position."""
    recorded = loaded.record_logits(jobs(prompts))
    picked = set()
    for prompt, edits, rows in zip(prompts, VARIANTS, recorded, strict=False):
        logits = torch.stack(rows)
        tokens = [int(row.argmax()) for row in rows]
        added = Added([FIRST, SECOND], edits, len(prompt))
        with added.on(attention_oracle.decoder.layers):
            expected = attention_oracle.logits(prompt + tokens[:-1])[-len(tokens) :]
        plain = attention_oracle.logits(prompt + tokens[:-1])[-len(tokens) :]
        assert (logits - expected).abs().max() <= 1e-3
        assert not edits or (plain - expected).abs().max() > 0.05
        picked |= added.picked
    assert len(picked) > 1  # the probe tells rows apart


def test_eight_profiles_in_one_batch(loaded, attention_oracle, prompts):
    """Each request with vectors of its own, of 1 to 8 directions, at all layers."""
    edits = [
        tuple(ResidualEdit(layer, each.digest, 0.2, site=BEHIND) for layer in range(30))
        for each in MANY
    ]
    programs = [residual_program(*each) for each in edits]
    several = [Job(prompt, each, 3) for prompt, each in zip(prompts, programs, strict=False)]
    for prompt, own, rows in zip(prompts, edits, loaded.record_logits(several), strict=False):
        tokens = [int(row.argmax()) for row in rows]
        with Added(MANY, own, len(prompt)).on(attention_oracle.decoder.layers):
            expected = attention_oracle.logits(prompt + tokens[:-1])[-len(tokens) :]
        assert (torch.stack(rows) - expected).abs().max() <= 1e-3


def test_scheduling_does_not_change_the_answer(loaded, prompts):
    alone = []
    for job in jobs(prompts):
        loaded.forget_cache()
        alone += loaded.run([job])
    # The last one finds all of its prompts in the cache.
    for schedule in {"step_tokens": 9}, {"preempt_after": [2, 4]}, {"stagger": 2}, {}:
        if schedule:
            loaded.forget_cache()
        for got, want in zip(loaded.run(jobs(prompts), **schedule), alone, strict=True):
            assert got.tokens == want.tokens, schedule
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4), schedule


def test_an_artefact_that_is_not_loaded_fails_its_request_only(loaded, prompts):
    unknown = residual_program(ResidualEdit(3, "0" * 64, 1.0))
    plain = loaded.run([Job(prompts[0], None, MAX_TOKENS)])[0]
    failed, other = loaded.run(
        [Job(prompts[1], unknown, MAX_TOKENS), Job(prompts[0], None, MAX_TOKENS)]
    )
    assert failed.finish_reason == "error" or not failed.tokens
    assert other.tokens == plain.tokens


def test_the_report_tells_how_many_positions_were_edited(loaded, prompts):
    job = jobs(prompts)[0]
    loaded.forget_cache()
    loaded.run([job])
    report = loaded.runner.steering.pop_report(job.request.report_id)
    assert report.is_complete and report.positions_edited == MAX_TOKENS
    assert report.by_scope == {"from_last_prompt_token": MAX_TOKENS}
