"""Runs jobs on vLLM's V2 runner under Triton's interpreter, in a process of its own.

Arguments: a pickle of {"engine": LLM arguments, "artifacts": encoded ones to load, "runs": [(jobs,
options of Harness.run)]}, and the file for a pickle of what came out: per run the results, and the
engine's report of each job.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def import_tests() -> None:
    """Make `tests` importable, and nothing else of the checkout."""
    folder = ROOT / "tests"
    spec = importlib.util.spec_from_file_location(
        "tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tests"] = module
    spec.loader.exec_module(module)


def main(source: str, target: str) -> None:
    import_tests()
    from tests import triton_cpu

    triton_cpu.install()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    task: dict[str, Any] = pickle.loads(Path(source).read_bytes())

    from vllm import LLM

    from headway.server.engine import plugin
    from tests.engine.harness import Harness

    plugin.WORKERS["vllm.v1.worker.cpu_worker.CPUWorker"] = "tests.v2_worker.V2CpuWorker"
    harness = Harness(LLM(**task["engine"], additional_config={"headway": {}}))
    harness.runner.warm_up_steering()
    for artifact in task["artifacts"]:
        harness.llm.collective_rpc("headway_load_artifacts", args=([artifact],))
    done = []
    for jobs, options in task["runs"]:
        if options.pop("forget_cache", False):
            harness.forget_cache()
        started = time.monotonic()
        results = harness.run(jobs, **options)
        print(f"{len(jobs)} jobs in {time.monotonic() - started:.0f} s")
        done.append((results, [report(harness, job) for job in jobs]))
    Path(target).write_bytes(pickle.dumps(done))


def report(harness: Any, job: Any) -> dict[str, Any] | None:
    if job.request is None:
        return None
    found = harness.runner.steering.pop_report(job.request.report_id)
    return found.as_dict() if found is not None else None


if __name__ == "__main__":
    main(*sys.argv[1:])
