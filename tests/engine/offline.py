"""Engines in processes of their own, as `vllm.LLM` starts them by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from headway.server.models.smollm2 import ensure_smollm2


def run_offline(
    directory: Path,
    headway: bool,
    requests: list[dict[str, Any]],
    fail_scale: float | None = None,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    """Run requests in a fresh process; without Headway its plugin is not even loaded.

    See `offline_run.py` for requests and results.
    """
    engine = {
        "model": str(ensure_smollm2()),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 1 << 29,
        **engine,
    }
    task: dict[str, Any] = {"engine": engine, "requests": requests}
    plugins = {"VLLM_PLUGINS": "headway" if headway else ""}
    environment = {**os.environ, **plugins, **(environment or {})}
    if headway:
        engine["additional_config"] = {"headway": {}}
    if fail_scale is not None:
        task["fail_scale"] = fail_scale
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as by default: a worker process
        # vLLM sends a function to its workers only with this.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    target = directory / ("headway.json" if headway else "stock.json")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "offline_run.py"), str(target)],
        input=json.dumps(task),
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads(target.read_text())
    return results
