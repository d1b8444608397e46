"""An engine under load in a process of its own; started by `headway.benchmarks.engine`.

Reads one JSON object a line from stdin, {"scenarios": [{...}], "model": ...} first and {"run":
name of a scenario} after it, and answers each with one line on the stdout it was started with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.benchmarks.scenarios import STEERING, Scenario, Steering


def start(scenarios: Sequence[Scenario], model: str) -> Any:
    """The `vllm.LLM` of scenarios that share an engine."""
    from vllm import LLM

    first = scenarios[0]
    return LLM(
        model,
        dtype=first.dtype,
        enforce_eager=first.enforce_eager,
        enable_prefix_caching=True,
        max_model_len=max((each.prompt_tokens or 0) + each.output_tokens for each in scenarios)
        + 16,
        max_num_seqs=max(each.num_requests for each in scenarios),
        seed=0,
        additional_config={"headway": {}} if first.headway else {},
    )


class Load:
    """The requests of a scenario."""

    def __init__(self, scenario: Scenario, llm: Any) -> None:
        from vllm import SamplingParams

        self.scenario = scenario
        self.llm = llm
        vocabulary = self.llm.get_tokenizer().vocab_size
        shape = (scenario.num_prompts, scenario.prompt_tokens or 0)
        self.tokens = np.random.default_rng(0).integers(0, vocabulary, shape).tolist()
        self.runs = 0
        self.params: Any = SamplingParams(
            temperature=0, max_tokens=scenario.output_tokens, ignore_eos=True
        )
        self.specs = self._specs()

    def run(self) -> dict[str, float]:
        """Serve all requests once; tokens/s counts output tokens, from submission to the end."""
        prompts = self._prompts()
        started, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(prompts, self._params(), use_tqdm=False)
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

    def _prompts(self) -> list[dict[str, Any]]:
        # A salt of its own keeps a run that computes its prompts out of the cache of earlier ones.
        self.runs += 1
        salt = {} if self.scenario.cached else {"cache_salt": f"{self.scenario.name} {self.runs}"}
        return [
            {"prompt_token_ids": self.tokens[index % len(self.tokens)], **salt}
            for index in range(self.scenario.num_requests)
        ]

    def _specs(self) -> list[Steering]:
        if self.scenario.steering is None:
            return []
        from headway.server.engine.geometry import geometry_of

        geometry = geometry_of(self.llm.llm_engine.vllm_config)
        build = STEERING[self.scenario.steering]
        scenario = self.scenario
        return [
            build(geometry, index % scenario.configurations)
            for index in range(scenario.num_requests)
        ]

    def _params(self) -> Any:
        if not self.specs:
            return self.params
        from headway.server.engine.request import SteeringRequest, attach
        from headway.steering import SteeringProgram, sampling_params

        steered = []
        for spec in self.specs:
            if isinstance(spec, SteeringProgram):
                steered.append(self.params.clone())
                attach(steered[-1], SteeringRequest(spec))
            else:
                steered.append(sampling_params(self.params, spec))
        return steered

    def _run_reported(self) -> dict[str, Any]:
        from headway.server.engine.client import engine_report
        from headway.server.engine.geometry import geometry_of
        from headway.server.engine.request import SteeringRequest, attach
        from headway.steering import SteeringProgram, compile_spec, parse_spec

        geometry = geometry_of(self.llm.llm_engine.vllm_config)
        programs = [
            spec if isinstance(spec, SteeringProgram) else compile_spec(parse_spec(spec), geometry)
            for spec in self.specs
        ]
        requests = [SteeringRequest(program) for program in programs]
        params = []
        for request in requests:
            params.append(self.params.clone())
            attach(params[-1], request)
        self.llm.generate(self._prompts(), params, use_tqdm=False)
        edited = 0
        for request in requests:
            answers = self.llm.collective_rpc("headway_pop_report", args=(request.report_id,))
            report = engine_report(answers)
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
    scenarios = [Scenario(**scenario) for scenario in first["scenarios"]]
    llm = start(scenarios, first["model"])
    loads = {scenario.name: Load(scenario, llm) for scenario in scenarios}
    verified = {name: load.verify() for name, load in loads.items()}
    print(json.dumps(verified), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(loads[json.loads(line)["run"]].run()), file=answers, flush=True)


if __name__ == "__main__":
    main()
