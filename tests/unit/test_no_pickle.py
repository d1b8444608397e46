"""Nothing that a client or another process sends is unpickled or evaluated."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import envs
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

import headway.kernels
import headway.server
import headway.steering
from headway.server.engine.report import EngineReport
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.artifacts import ResidualArtifact, decode_artifact, encode_artifact
from headway.steering.wire import encode_program

pytestmark = pytest.mark.unit

PACKAGES = tuple(
    Path(str(package.__file__)).parent
    for package in (headway.server, headway.steering, headway.kernels)
)
IMPORTERS = PACKAGES[0] / "importers"
"""Read files of other projects, for commands only; `tests/unit/test_importers.py` tests how."""

MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "__import__"}
CALLS = {
    *(f"{name}.load" for name in ("torch", "yaml", "np", "numpy", "joblib")),
    *(f"yaml.{name}" for name in ("load_all", "unsafe_load", "full_load")),
    "os.system",
}
KEYWORDS = {"allow_pickle", "weights_only"}
SHELL = "shell"


def dangers(source: str) -> list[str]:
    """What in a module's source could run what it reads, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import | ast.ImportFrom):
            bad = [name for name in names if name.split(".")[0] in MODULES or name in CALLS]
            found += [f"{node.lineno}: import {name}" for name in bad]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in BUILTINS | CALLS:
            found.append(f"{node.lineno}: {called}")
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in KEYWORDS or (keyword.arg == SHELL and not is_false):
                found.append(f"{node.lineno}: {keyword.arg}=")
    return found


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]


def test_no_module_runs_what_it_reads() -> None:
    paths = [path for path in sources() if IMPORTERS not in path.parents]
    assert len(paths) > 150
    found = {str(path): dangers(path.read_text()) for path in paths}
    assert not {path: words for path, words in found.items() if words}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load(f, weights_only=True)",
        "np.load(f)",
        "np.frombuffer(f, allow_pickle=True)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
    ],
)
def test_the_walk_would_find_it(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize("source", ["model.eval()", "json.load(f)", "run(a, shell=False)"])
def test_the_walk_finds_nothing_else(source: str) -> None:
    assert not dangers(source)


def test_the_walk_finds_what_the_importers_do() -> None:
    assert any(dangers(path.read_text()) for path in IMPORTERS.glob("*.py"))


def test_what_goes_to_the_workers_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's encoder takes it all without its fallback to pickle, and gives back the same."""
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    assert not envs.VLLM_ALLOW_INSECURE_SERIALIZATION
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    artifact = ResidualArtifact(rows, rows, rows[:, 0])
    geometry = ModelGeometry(4, 4, 2, 64, 256)
    methods = [
        {"method": "vhr", "heads": [[1, 2]], "alpha": 2.0},
        {"method": "head_scale", "scales": [[0, 1, -1.0]]},
    ]
    program = compile_spec(parse_spec({"methods": methods}, "steering"), geometry)
    for sent in (
        ("headway_load_artifacts", None, ([encode_artifact(artifact)], "holder"), None),
        ("headway_pop_report", None, ("id",), None),
        EngineReport(sequences=1, positions_computed=9, positions_edited=9).as_dict(),
        encode_program(program),
    ):
        assert decoded(sent) == listed(sent)
    assert decode_artifact(decoded(encode_artifact(artifact))).digest == artifact.digest
    with pytest.raises(TypeError, match="VLLM_ALLOW_INSECURE_SERIALIZATION"):
        decoded(object())


def decoded(value: Any) -> Any:
    return MsgpackDecoder().decode(MsgpackEncoder().encode(value))


def listed(value: Any) -> Any:
    """The value with lists for tuples, which msgpack does not know."""
    if isinstance(value, dict):
        return {key: listed(each) for key, each in value.items()}
    return [listed(each) for each in value] if isinstance(value, list | tuple) else value
