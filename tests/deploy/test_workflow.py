"""The workflow of the forge runs what exists, and keeps the report of the quick benchmark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from headway.benchmarks.options import RESULTS, output_file

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_it_runs_the_checks_with_the_python_of_the_project(workflow):
    test = workflow["jobs"]["test"]
    assert commands(test) == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for job in workflow["jobs"].values():
        (python,) = [
            step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")
        ]
        assert f'requires-python = ">={python["python-version"]}' in pyproject


def test_it_keeps_the_quick_report(workflow):
    bench = workflow["jobs"]["bench"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands(bench):
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.MULTILINE)
    (kept,) = [step["with"]["path"].split() for step in bench["steps"] if "path" in str(step)]
    folder = RESULTS.relative_to(RESULTS.parents[1]).as_posix()
    assert kept == [f"{folder}/report-*", f"{folder}/*.json"]
    assert output_file("overhead", None).match("benchmarks/results/*.json")
