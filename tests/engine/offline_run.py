"""Run requests through `vllm.LLM` in a process of its own; started by the tests, not by pytest.

Standard input: JSON {"engine": LLM arguments, "requests": [{"prompt": token ids, "steering":
spec or null, "sampling": SamplingParams arguments, "images": optional, files}], "fail_scale":
optional, a scale whose edit is made to raise in the worker}. Writes to the file named as argument:
JSON list of {"tokens", "logprobs", "finish_reason"} in the order of the requests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def make_fail(worker: Any, scale: float) -> None:
    """Runs in the worker: the affine kernel raises for this scale."""
    from headway.server.engine import cpu_plan

    original = cpu_plan.head_affine_

    def head_affine_(z: Any, rows: Any, factors: Any, shift: Any = None) -> None:
        if (factors == scale).any():
            raise RuntimeError("injected")
        original(z, rows, factors, shift)

    cpu_plan.head_affine_ = head_affine_


def pictures(files: Sequence[str]) -> dict[str, Any]:
    from PIL import Image

    images = [Image.open(file).convert("RGB") for file in files]
    return {"multi_modal_data": {"image": images}} if images else {}


def main(task: dict[str, Any], target: Path) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**task["engine"])
    if "fail_scale" in task:
        llm.collective_rpc(make_fail, args=(task["fail_scale"],))
    params = []
    for request in task["requests"]:
        sampling = SamplingParams(logprobs=0, ignore_eos=True, **request["sampling"])
        if request["steering"] is not None:
            from headway.steering import sampling_params

            sampling = sampling_params(sampling, request["steering"])
        params.append(sampling)
    prompts = [
        {"prompt_token_ids": request["prompt"], **pictures(request.get("images", ()))}
        for request in task["requests"]
    ]
    results = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        steps = zip(completion.logprobs or [], tokens, strict=True)
        results.append(
            {
                "tokens": tokens,
                "logprobs": [step[token].logprob for step, token in steps],
                "finish_reason": completion.finish_reason,
            }
        )
    target.write_text(json.dumps(results))


if __name__ == "__main__":
    # Engine processes are spawned and import this file again.
    main(json.load(sys.stdin), Path(sys.argv[1]))
