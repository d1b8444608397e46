"""An engine under load in a process of its own; started by `headway.benchmarks.engine`.

Reads one JSON object a line from stdin, {"scenario": {...}, "model": ...} first and {} for every
run after it, and answers each with one line on the stdout it was started with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from headway.benchmarks.scenarios import STEERING, Scenario


class Load:
    """The engine of a scenario and its requests."""

    def __init__(self, scenario: Scenario, model: str) -> None:
        from vllm import LLM, SamplingParams

        self.scenario = scenario
        self.llm: Any = LLM(
            model,
            dtype=scenario.dtype,
            enforce_eager=scenario.enforce_eager,
            enable_prefix_caching=False,
            max_model_len=scenario.prompt_tokens + scenario.output_tokens + 16,
            max_num_seqs=scenario.num_requests,
            seed=0,
            additional_config={"headway": {}} if scenario.headway else {},
        )
        vocabulary = self.llm.get_tokenizer().vocab_size
        shape = (scenario.num_requests, scenario.prompt_tokens)
        tokens = np.random.default_rng(0).integers(0, vocabulary, shape)
        self.prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
        self.params: Any = SamplingParams(
            temperature=0, max_tokens=scenario.output_tokens, ignore_eos=True
        )
        self.specs = self._specs()

    def run(self) -> dict[str, float]:
        """Serve all requests once; tokens/s counts output tokens, from submission to the end."""
        started, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(self.prompts, self._params(), use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"tokens": tokens, "seconds": seconds, "cpu_seconds": time.process_time() - cpu}

    def verify(self) -> dict[str, Any]:
        """Serve all requests once and show that they were steered as the scenario says.

        Raises RuntimeError if a position was not edited, or an engine without Headway has it.
        """
        worker = self.llm.llm_engine.vllm_config.parallel_config.worker_cls
        if worker.startswith("headway.") != self.scenario.headway:
            raise RuntimeError(f"{self.scenario.name}: the engine's worker is {worker}")
        if not self.scenario.headway:
            loaded = [name for name in sys.modules if name.startswith("headway.server")]
            if loaded:
                raise RuntimeError(f"stock vLLM has Headway's modules loaded: {loaded}")
        if not self.specs:
            self.run()
            return {"worker": worker, "programs": 0, "positions_edited": 0}
        return {"worker": worker, **self._run_reported()}

    def _specs(self) -> list[dict[str, Any]]:
        if self.scenario.steering is None:
            return []
        from headway.server.engine.geometry import geometry_of

        geometry = geometry_of(self.llm.llm_engine.vllm_config)
        build = STEERING[self.scenario.steering]
        return [build(geometry, index) for index in range(self.scenario.num_requests)]

    def _params(self) -> Any:
        if not self.specs:
            return self.params
        from headway.steering import sampling_params

        return [sampling_params(self.params, spec) for spec in self.specs]

    def _run_reported(self) -> dict[str, Any]:
        from headway.server.engine.client import first_report
        from headway.server.engine.geometry import geometry_of
        from headway.server.engine.request import SteeringRequest, attach
        from headway.steering import compile_spec, parse_spec

        geometry = geometry_of(self.llm.llm_engine.vllm_config)
        programs = [compile_spec(parse_spec(spec), geometry) for spec in self.specs]
        requests = [SteeringRequest(program) for program in programs]
        params = []
        for request in requests:
            params.append(self.params.clone())
            attach(params[-1], request)
        self.llm.generate(self.prompts, params, use_tqdm=False)
        edited = 0
        for request in requests:
            answers = self.llm.collective_rpc("headway_pop_report", args=(request.report_id,))
            report = first_report(answers)
            if report is None or not report.is_complete:
                raise RuntimeError(f"a request was not steered as asked: {report}")
            edited += report.positions_edited
        distinct = len({program.fingerprint for program in programs})
        return {"programs": distinct, "positions_edited": edited}


def main() -> None:
    """Answer lines until stdin ends."""
    # Whatever libraries print goes to stderr; the answers keep the original stdout.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    first = json.loads(sys.stdin.readline())
    load = Load(Scenario(**first["scenario"]), first["model"])
    print(json.dumps(load.verify()), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(load.run()), file=answers, flush=True)


if __name__ == "__main__":
    main()
