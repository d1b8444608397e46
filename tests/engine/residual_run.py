"""Serves token prompts, each with a method of its own, in a process of its own.

Reads {"engine": LLM arguments, "prompts", "methods", "max_tokens"} as JSON from stdin and writes a
list of (tokens, logprobs) to the file that is named.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(target: str) -> None:
    from vllm import LLM, SamplingParams

    from headway.steering import sampling_params

    task = json.load(sys.stdin)
    llm = LLM(
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 24,
        **task["engine"],
    )
    params = SamplingParams(
        temperature=0, max_tokens=task["max_tokens"], logprobs=0, detokenize=False
    )
    steered = [sampling_params(params, {"methods": [method]}) for method in task["methods"]]
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    answers = []
    for output in llm.generate(prompts, steered):
        [completion] = output.outputs
        tokens = list(completion.token_ids)
        found = zip(completion.logprobs or [], tokens, strict=True)
        answers.append((tokens, [at[token].logprob for at, token in found]))
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
