"""SGRS as published, in `headway bench sgrs`: its saliencies are those of the oracle."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headway.benchmarks.engine import KEEP_MEMORY, EngineError
from headway.benchmarks.sgrs_published import Published, PublishedProcess
from tests.sgrs_oracle import output_history, saliencies

pytestmark = pytest.mark.unit


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


CONTEXT = [int(token) for token in torch.arange(3, 24) % 60]
PROMPT_LEN = 9


@pytest.mark.parametrize("layers", [[0], [1, 2], [3]])
def test_the_published_procedure_finds_the_saliencies_of_the_oracle(
    llama: LlamaForCausalLM, layers: list[int]
) -> None:
    candidates = [4, 17, 51]
    history = output_history(len(CONTEXT), PROMPT_LEN)
    expected = saliencies(llama, CONTEXT, candidates, layers, history).values
    published = Published(llama)
    found = [published.saliency(CONTEXT, each, layers, PROMPT_LEN) for each in candidates]
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert len({round(value, 6) for value in found}) == 3


def test_no_gradient_of_a_parameter_is_computed(llama: LlamaForCausalLM) -> None:
    published = Published(llama)
    value, seconds = published.timed(CONTEXT, 4, [1], PROMPT_LEN)
    assert value == published.saliency(CONTEXT, 4, [1], PROMPT_LEN) and seconds > 0
    for parameter in llama.parameters():
        assert parameter.grad is None and not parameter.requires_grad


@pytest.mark.parametrize("prompt_len", [len(CONTEXT), len(CONTEXT) + 1, -1])
def test_without_history_there_is_no_saliency(llama: LlamaForCausalLM, prompt_len: int) -> None:
    with pytest.raises(ValueError, match="no history"):
        Published(llama).saliency(CONTEXT, 4, [1], prompt_len)


@pytest.mark.slow
def test_it_is_timed_in_a_process_with_the_malloc_of_the_server(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    with closing(PublishedProcess(tmp_path, "float32")) as timed:
        value, seconds = timed.timed(CONTEXT, 4, [1], PROMPT_LEN)
        assert value == pytest.approx(Published(llama).saliency(CONTEXT, 4, [1], PROMPT_LEN))
        assert seconds > 0
        environment = psutil.Process(timed.process.pid).environ()
        assert KEEP_MEMORY.items() <= environment.items()
        timed.process.kill()
        with pytest.raises(EngineError, match="published procedure ended"):
            timed.timed(CONTEXT, 4, [1], PROMPT_LEN)
