"""An unsteered request on a Headway engine gives exactly what stock vLLM gives."""

from __future__ import annotations

import pytest

from tests.engine.offline import run_offline

pytestmark = [pytest.mark.engine, pytest.mark.slow]

VHR = {"method": "vhr", "heads": [[3, 1], [11, 7], [20, 2]], "alpha": 2.0}
STEERED = {
    "methods": [
        VHR,
        {"method": "locore", "beta": 1.0},
        {"method": "head_ablation", "heads": [[5, 0], [15, 3]], "mode": "uniform"},
    ]
}
ZERO = {"methods": [{"method": "vhr", "heads": [[3, 1], [11, 7]], "alpha": 1.0}]}


@pytest.fixture(scope="module")
def plain(prompts) -> list[dict]:
    """Every prompt greedily, then sampled with a seed."""
    greedy = {"temperature": 0.0, "max_tokens": 8}
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 8}
    return [
        {"prompt": prompt, "steering": None, "sampling": sampling}
        for sampling in (greedy, sampled)
        for prompt in prompts[:6]
    ]


@pytest.fixture(scope="module")
def stock(plain, tmp_path_factory) -> list[dict]:
    return run_offline(tmp_path_factory.mktemp("stock"), False, plain)


@pytest.fixture(scope="module")
def mixed(plain, tmp_path_factory) -> list[dict]:
    """The same batch on Headway, every third request steered, every third with strength zero."""
    steering = [None, STEERED, ZERO]
    requests = [{**request, "steering": steering[index % 3]} for index, request in enumerate(plain)]
    return run_offline(tmp_path_factory.mktemp("mixed"), True, requests)


@pytest.mark.parametrize("kind", [0, 2], ids=["unsteered", "zero_strength"])
def test_requests_beside_steered_ones_equal_stock_vllm(stock, mixed, kind):
    for index in range(kind, len(stock), 3):
        assert mixed[index] == stock[index]  # tokens, and logprobs bit for bit


def test_steered_neighbours_really_were_steered(stock, mixed):
    different = [mixed[index] != stock[index] for index in range(1, len(stock), 3)]
    assert all(different)


def test_compiled_mode_steers_like_eager_mode(prompts, oracle, tmp_path):
    """torch.compile keeps attention, and with it the edit, opaque: float32 against the oracle."""
    import torch

    edits = [(3, 1, 2.0, None), (11, 7, 2.0, None), (20, 2, 2.0, None)]
    greedy = {"temperature": 0.0, "max_tokens": 5}
    requests = [
        {
            "prompt": prompt,
            "steering": {"methods": [VHR]} if index % 2 else None,
            "sampling": greedy,
        }
        for index, prompt in enumerate(prompts[:6])
    ]
    results = run_offline(tmp_path, True, requests, dtype="float32", enforce_eager=False)
    for index, (request, result) in enumerate(zip(requests, results, strict=True)):
        tokens = result["tokens"]
        sequence = request["prompt"] + tokens[:-1]
        logits = oracle.logits(sequence, edits if index % 2 else [])[-len(tokens) :]
        expected = torch.log_softmax(logits, -1)[range(len(tokens)), tokens].tolist()
        assert logits.argmax(-1).tolist() == tokens
        assert result["logprobs"] == pytest.approx(expected, abs=1e-3)
