"""Residual edits where the model is compiled and two ranks share it, against the formula.

A small Llama of random weights, steered offline by profiles that the engine is started with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headway.steering import ModelGeometry
from headway.steering.program import QueryScope, ResidualEdit, ResidualForm, ResidualSite
from headway.steering.vectors import VectorProfile
from tests.attention_oracle import AttentionOracle
from tests.residual import Added
from tests.vectors import drawn_profile

pytestmark = [pytest.mark.engine, pytest.mark.slow]

GEOMETRY = ModelGeometry(3, 4, 2, 32, 64, architecture="LlamaForCausalLM")
LAYERS = (0, 1, 2)
PROFILES = {
    "behind": drawn_profile(GEOMETRY, layers=LAYERS, seed=1),
    "inside": drawn_profile(GEOMETRY, layers=LAYERS, seed=2, site=ResidualSite.AFTER_ATTENTION),
    "fixed": drawn_profile(GEOMETRY, "caa", layers=(1,), seed=3, site=ResidualSite.BLOCK_INPUT),
}
METHODS: list[dict[str, Any]] = [
    {"method": "gact", "profile": "behind", "strength": 2.0},
    {"method": "gact", "profile": "inside", "strength": 1.0, "scope": "all"},
    {"method": "caa", "profile": "fixed", "strength": 9.0, "scope": "all"},
    {"method": "caa", "profile": "fixed", "mode": "remove", "scope": "all"},
]
PROMPTS = [[5, 9, 200, 31, 77, 8], [400, 3, 3, 90], [17, 301, 44, 260, 19, 6, 8, 11], [2, 499, 7]]
MAX_TOKENS = 4
ENGINE: dict[str, Any] = {"enforce_eager": False, "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, and the profiles beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=GEOMETRY.hidden_size,
        intermediate_size=128,
        num_hidden_layers=GEOMETRY.num_layers,
        num_attention_heads=GEOMETRY.num_heads,
        num_key_value_heads=GEOMETRY.num_kv_heads,
        head_dim=GEOMETRY.head_size,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    for name, profile in PROFILES.items():
        profile.save(profile_path(folder, name))
    return folder


def profile_path(folder: Path, name: str) -> Path:
    # Not beside the weights, where vLLM would take it for some of them.
    (folder / "profiles").mkdir(exist_ok=True)
    return folder / "profiles" / f"{name}.safetensors"


def test_equals_the_oracle(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.json"
    profiles = {name: str(profile_path(model, name)) for name in PROFILES}
    settings = {"profiles": profiles, "residual_edits": "after_attention"}
    engine = {"model": str(model), "additional_config": {"headway": settings}, **ENGINE}
    task = {"engine": engine, "prompts": PROMPTS, "methods": METHODS, "max_tokens": MAX_TOKENS}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "residual_run.py"), str(target)],
        input=json.dumps(task),
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **a_core_for_each_rank()},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    answers = json.loads(target.read_text())
    oracle = AttentionOracle(LlamaForCausalLM.from_pretrained(model))
    for prompt, method, (tokens, logprobs) in zip(PROMPTS, METHODS, answers, strict=True):
        edits, profile = edits_of(method)
        with Added(list(profile.artifacts.values()), edits, len(prompt)).on(oracle.decoder.layers):
            logits = oracle.logits(prompt + tokens[:-1])[-len(tokens) :]
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=0)
        plain = oracle.logits(prompt + tokens[:-1])[-len(tokens) :].log_softmax(-1)
        assert (plain[range(len(tokens)), tokens] - expected).abs().max() > 0.02, method


def a_core_for_each_rank() -> dict[str, str]:
    """By itself vLLM gives each rank a NUMA node, of which there may be one."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


def edits_of(method: dict[str, Any]) -> tuple[list[ResidualEdit], VectorProfile]:
    """What a method is to do, written out by hand."""
    profile = PROFILES[method["profile"]]
    forms = {"gact": ResidualForm.RMS, "caa": ResidualForm(method.get("mode", "add"))}
    scope = QueryScope(method.get("scope", "from_last_prompt_token"))
    edits = [
        ResidualEdit(
            layer,
            artifact.digest,
            method.get("strength", 1.0),
            scope,
            site=profile.header.site,
            form=forms[method["method"]],
        )
        for layer, artifact in profile.artifacts.items()
    ]
    return edits, profile
