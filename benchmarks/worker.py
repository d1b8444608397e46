"""An engine under load in a process of its own; started by `headway.benchmarks.engine`.

Reads one JSON object a line from stdin, {"scenarios": [{...}], "model": ..., "memory": ...} first
and {"run": name of a scenario} after it, and answers each with one line on the stdout it was
started with. It runs in a folder that it may write to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headway.benchmarks.scenarios import SINK_DIMS, STEERING, TAU, Scenario, Steering
from headway.steering import ModelGeometry
from headway.steering.sinks import DimMeasurement, SinkProfile


def start(scenarios: Sequence[Scenario], model: str, memory: float | None) -> Any:
    """The `vllm.LLM` of scenarios that share an engine; memory: see `options`.

    Raises RuntimeError where vLLM would not run on the device that is to be measured.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cuda = memory is not None
    if current_platform.is_cuda() != on_cuda:
        found, meant = current_platform.device_type, "cuda" if on_cuda else "cpu"
        raise RuntimeError(f"vLLM runs on {found or 'nothing'} here, not on {meant}")
    settings = options(scenarios, memory)
    if on_cuda and scenarios[0].headway:
        path = Path("sinks.json").absolute()
        sink_profile(_geometry(model)).save(path)
        settings["additional_config"] = {"headway": {"profiles": {"sinks": str(path)}}}
    return LLM(model, **settings)


def options(scenarios: Sequence[Scenario], memory: float | None) -> dict[str, Any]:
    """What the engine of these scenarios is started with.

    memory: its share of the CUDA device's memory, None on CPU.
    """
    first = scenarios[0]
    share = {} if memory is None else {"gpu_memory_utilization": memory}
    return {
        "dtype": first.dtype,
        "enforce_eager": first.enforce_eager,
        "enable_prefix_caching": True,
        "max_model_len": max((each.prompt_tokens or 0) + each.output_tokens for each in scenarios)
        + 16,
        "max_num_seqs": max(each.num_requests for each in scenarios),
        "seed": 0,
        "additional_config": {"headway": {}} if first.headway else {},
        **share,
    }


def sink_profile(geometry: ModelGeometry) -> SinkProfile:
    """Names the sink dimensions of the scenarios: else CUDA graphs would not tag their sinks.

    They are no finding about the model, and nothing was measured.
    """
    nothing = (0.0,) * geometry.num_layers
    return SinkProfile.of(
        geometry,
        dims=SINK_DIMS,
        tau=TAU,
        num_prompts=0,
        num_tokens=0,
        sink_tokens=0,
        measurements=tuple(
            DimMeasurement(dim=dim, phi_first=nothing, phi_other=nothing, sink_tokens=0)
            for dim in SINK_DIMS
        ),
    )


def _geometry(model: str) -> ModelGeometry:
    from vllm.engine.arg_utils import EngineArgs

    from headway.server.engine.geometry import geometry_of

    return geometry_of(EngineArgs(model=model).create_engine_config())


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
        self._load_artifacts()

    def run(self) -> dict[str, float]:
        """Serve all requests once; tokens/s counts output tokens, from submission to the end.

        Raises RuntimeError if an output is shorter than asked for.
        """
        prompts = self._prompts()
        if self.scenario.cached:
            # Other loads may have driven the prompts out of the cache since they were last served.
            self.llm.generate(prompts, self._one_token(), use_tqdm=False)
        started, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(prompts, self._params(), use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        cpu = time.process_time() - cpu
        if tokens != self.scenario.num_requests * self.scenario.output_tokens:
            raise RuntimeError(f"{self.scenario.name}: only {tokens} tokens, a request failed")
        prompts_cached = sum(output.num_cached_tokens or 0 for output in outputs) / sum(
            len(output.prompt_token_ids) for output in outputs
        )
        return {
            "tokens": tokens,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "prompts_cached": prompts_cached,
        }

    def verify(self) -> dict[str, Any]:
        """Serve all requests once and show that they were steered as the scenario says.

        Raises RuntimeError if a position was not edited, or an engine without Headway has it, or
        one that is to have CUDA graphs has none.
        """
        config = self.llm.llm_engine.vllm_config
        worker = config.parallel_config.worker_cls
        facts = {"worker": worker}
        if not self.scenario.enforce_eager:
            facts["cudagraph_mode"] = mode = config.compilation_config.cudagraph_mode.name
            if mode == "NONE":
                raise RuntimeError(f"{self.scenario.name}: the engine has no CUDA graphs")
        if worker.startswith("headway.") != self.scenario.headway:
            raise RuntimeError(f"{self.scenario.name}: the engine's worker is {worker}")
        if not self.scenario.headway:
            loaded = [name for name in sys.modules if name.startswith("headway.server")]
            if loaded:
                raise RuntimeError(f"stock vLLM has Headway's modules loaded: {loaded}")
        if not self.specs:
            self.run()
            return {**facts, "programs": 0, "positions_edited": 0}
        return {**facts, **self._run_reported()}

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

    def _load_artifacts(self) -> None:
        """As the server does before it lets a request in that adds vectors."""
        programs = [spec for spec in self.specs if not isinstance(spec, dict)]
        artifacts = {each.digest: each for program in programs for each in program.artifacts}
        if artifacts:
            from headway.steering.artifacts import encode_artifact

            wires = [encode_artifact(each) for each in artifacts.values()]
            self.llm.collective_rpc("headway_load_artifacts", args=(wires, self.scenario.name))

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

    def _one_token(self) -> Any:
        params = self._params() if self.specs else self.params.clone()
        for each in params if isinstance(params, list) else [params]:
            each.max_tokens = 1
        return params

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
        edited = draws = 0
        for request in requests:
            answers = self.llm.collective_rpc("headway_pop_report", args=(request.report_id,))
            report = engine_report(answers)
            if report is None or not report.is_complete:
                raise RuntimeError(f"a request was not steered as asked: {report}")
            edited += report.positions_edited
            drawn = sum(sequence["draws"] for sequence in report.saliency)
            if request.program.sampling_gate and drawn < self.scenario.output_tokens:
                raise RuntimeError(f"only {drawn} candidates were judged")
            draws += drawn
        distinct = len({program.fingerprint for program in programs})
        return {"programs": distinct, "positions_edited": edited, "draws": draws}


def main() -> None:
    """Answer lines until stdin ends."""
    # Whatever libraries print goes to stderr; the answers keep the original stdout.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    first = json.loads(sys.stdin.readline())
    scenarios = [Scenario(**scenario) for scenario in first["scenarios"]]
    llm = start(scenarios, first["model"], first["memory"])
    loads = {scenario.name: Load(scenario, llm) for scenario in scenarios}
    verified = {name: load.verify() for name, load in loads.items()}
    print(json.dumps(verified), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(loads[json.loads(line)["run"]].run()), file=answers, flush=True)


if __name__ == "__main__":
    main()
