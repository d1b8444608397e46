"""One engine per test session, float32 and eager, in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from headway.server.models.demo_vlm import ensure_demo_vlm
from headway.server.models.smollm2 import ensure_smollm2
from tests import tiny_llava
from tests.attention_oracle import AttentionOracle
from tests.engine.harness import Harness
from tests.oracle import EagerOracle
from tests.vhr_oracle import VHROracle

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours.",
    "How many legs does a spider have?",
    "Name a famous painter.",
    "Explain gravity to a child.",
    "Translate 'good morning' to Spanish.",
    "What do bees make?",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes, step by step, with the amounts of flour, milk and eggs.",
    "What is two plus two?",
    "Describe a forest in autumn in a short paragraph with many adjectives.",
    "Is the moon bigger than the earth? Answer with yes or no, then say why in one sentence.",
    "Write a Python function that reverses a string.",
    "What happens when water boils?",
    "Complete the sentence: the quick brown fox",
    "Tell me a joke about computers.",
    "Why is the sky blue?",
    "What language is spoken in Brazil?",
    "Count from one to ten.",
    "Summarise: cats sleep most of the day, hunt at dawn and dusk, and like warm places.",
]


@pytest.fixture(scope="session")
def oracle() -> EagerOracle:
    return EagerOracle(ensure_smollm2())


@pytest.fixture(scope="session")
def prompts(oracle: EagerOracle) -> list[list[int]]:
    """Chat prompts of different lengths, as token ids."""
    return [
        oracle.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    ]


@pytest.fixture(scope="session")
def attention_oracle() -> AttentionOracle:
    """SmolLM2 in transformers, with edited attention matrices."""
    return AttentionOracle(AutoModelForCausalLM.from_pretrained(ensure_smollm2()))


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> Path:
    """The checkpoint of the tiny image model."""
    return tiny_llava.build(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def llava_oracle(llava_folder) -> AttentionOracle:
    return AttentionOracle(tiny_llava.oracle_model(llava_folder))


@pytest.fixture(scope="session")
def llava(llava_folder):
    """Headway on vLLM-CPU: the tiny image model in float32, prefix caching on."""
    return start(
        llava_folder,
        max_model_len=512,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 27,
        limit_mm_per_prompt={"image": 2},
    )


@pytest.fixture(scope="session")
def demo_vlm_folder() -> Path:
    """The checkpoint of the demo image model, float32."""
    return ensure_demo_vlm()


@pytest.fixture(scope="session")
def demo_vlm_processor(demo_vlm_folder):
    return AutoProcessor.from_pretrained(demo_vlm_folder)


@pytest.fixture(scope="session")
def vhr_oracle(demo_vlm_folder) -> VHROracle:
    """The demo image model in transformers, with VHR's choice of heads."""
    return VHROracle(LlavaForConditionalGeneration.from_pretrained(demo_vlm_folder))


@pytest.fixture(scope="session")
def demo_vlm(demo_vlm_folder):
    """Headway on vLLM-CPU: the demo image model in float32, prefix caching on."""
    return start(
        demo_vlm_folder,
        max_model_len=1024,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 28,
        limit_mm_per_prompt={"image": 2},
    )


@pytest.fixture(scope="session")
def harness():
    """Headway on vLLM-CPU: SmolLM2 in float32, prefix caching on."""
    return start(
        ensure_smollm2(),
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=32,
        kv_cache_memory_bytes=1 << 30,
    )


def start(model: str | Path, **sizes: Any) -> Harness:
    """An engine in this process, float32, eager, with blocks of 32 tokens."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(
        str(model),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        additional_config={"headway": {}},
        seed=0,
        **sizes,
    )
    # It stays set for the processes that later tests start: with the worker in the engine's process
    # they are much faster on two cores. `run_offline` with a fault has the default.
    return Harness(llm)
