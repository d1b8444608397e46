"""`headway doctor`: what is installed, whether it fits together, what would be refused and why.

vLLM symbols relied on: `vllm.platforms.current_platform`, `vllm.triton_utils.HAS_TRITON`,
`vllm.envs.VLLM_USE_V2_MODEL_RUNNER`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

from headway.kernels.compiled import compiled_path
from headway.server.commands.model import quiet_stdout
from headway.server.commands.plugins import NAME, VARIABLE, PluginError, own_plugins
from headway.steering.compile import ENGINE_FEATURES
from headway.steering.program import Feature

CPU_KERNELS = (
    "cache_products",
    "linear_grad",
    "residual_edit",
    "row_gradients",
    "segment_attention",
)
"""Those that are compiled when Headway is installed, and missing where that failed."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ok is None where there is nothing to judge."""

    name: str
    ok: bool | None = True
    detail: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAIL", None: "-"}[self.ok]
        return f"  {mark:<4}  {self.name}" + (f": {self.detail}" if self.detail else "")


def main(argv: Sequence[str]) -> int:
    """Print the findings; 1 if something is wrong."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    wrong = 0
    for title, findings in examine(args.model):
        print(title)
        for finding in findings:
            print(finding)
            wrong += finding.ok is False
    print("all is well" if not wrong else f"{wrong} problem{'s' if wrong > 1 else ''}")
    return 1 if wrong else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="headway doctor",
        description="Check the installation: versions, the vLLM symbols that Headway relies on, "
        "its plugins, and with MODEL whether that model can be steered. Exit code 1 if not.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model as for headway serve")
    return parser


def examine(model: str | None) -> Iterator[tuple[str, list[Finding]]]:
    """The sections of the examination, each found when it is asked for."""
    yield "versions", versions()
    yield "device", device()
    yield "vLLM symbols", seams()
    yield "plugins", plugins()
    if model is not None:
        yield f"model {model}", model_support(model)
    yield "refused by this version, in any model", refused()


def versions() -> list[Finding]:
    """Headway, Python and what decides whether they work together."""
    providers = sorted(set(packages_distributions().get("vllm", [])))
    described = ", ".join(f"{name} {version(name)}" for name in providers)
    if not providers:
        described = "not installed; install headway[cpu] or headway[gpu]"
    elif len(providers) > 1:
        described += ": they overwrite each other, install one of them"
    return [
        Finding("python", None, platform.python_version()),
        *(_installed(name) for name in ("headway", "torch", "transformers")),
        Finding("vllm, from the distribution", len(providers) == 1, described),
    ]


def device() -> list[Finding]:
    """Where vLLM would run, and whether with the model runner that Headway steers there.

    That is V2 on CUDA, whose kernels are Triton's, and V1 on CPU.
    """
    try:
        with quiet_stdout():
            from vllm import envs
            from vllm.platforms import current_platform
            from vllm.triton_utils import HAS_TRITON
    except ImportError as error:
        return [Finding("vllm", False, f"cannot be imported: {error}")]
    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    if current_platform.is_cpu():
        detail = "VLLM_USE_V2_MODEL_RUNNER=1 chooses V2" if chosen else ""
        return [
            Finding("device", None, "cpu"),
            Finding("V1 model runner", not chosen, detail),
            *compiled(),
        ]
    if not current_platform.is_cuda():
        name = current_platform.device_type or "none that vLLM knows"
        return [Finding("device", False, f"{name}; Headway steers on cuda and cpu")]
    detail = "vLLM would choose it"
    if chosen is False:
        detail = "VLLM_USE_V2_MODEL_RUNNER=0 chooses V1"
    elif not HAS_TRITON:
        detail = "vLLM has no Triton to use; VLLM_LOGGING_LEVEL=INFO shows why"
    return [
        Finding("device", None, current_platform.get_device_name()),
        _triton(),
        Finding("V2 model runner", chosen is not False and HAS_TRITON, detail),
    ]


def compiled() -> list[Finding]:
    """What CPU needs compiled: Headway's own kernels, and by torch while an engine runs."""
    missing = [name for name in CPU_KERNELS if compiled_path(name) is None]
    detail = ""
    if missing:
        detail = f"not built: {', '.join(missing)}; install headway again where there is gcc"
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler)
    lacking = (
        f"no {compiler}; torch compiles with it at start unless --enforce-eager is given, and at "
        "requests for logprobs even then: install g++ or name another in CXX"
    )
    return [
        Finding("C kernels", not missing, detail),
        Finding("C++ compiler", found is not None, found or lacking),
    ]


def seams() -> list[Finding]:
    """Every vLLM symbol that the engine relies on."""
    try:
        with quiet_stdout():
            from headway.server.engine.seams import check_seams

            return [Finding(check.name, check.ok, check.detail) for check in check_seams()]
    except ImportError as error:
        return [Finding("vllm", False, f"cannot be imported: {error}")]


def plugins() -> list[Finding]:
    """Headway's entry points, and whether VLLM_PLUGINS lets them load."""
    findings = []
    try:
        with quiet_stdout():
            found = own_plugins()
        findings += [Finding(plugin.group, True, plugin.value) for plugin in found]
    except PluginError as error:
        findings.append(Finding("entry points", False, str(error)))
    allowed = os.environ.get(VARIABLE)
    if allowed is None:
        findings.append(Finding(VARIABLE, None, "not set; headway serve sets it"))
    else:
        named = NAME in allowed.split(",")
        detail = f"{allowed!r}" + ("" if named else "; offline engines would not steer")
        findings.append(Finding(VARIABLE, named, detail))
    return findings


def model_support(model: str) -> list[Finding]:
    """Whether `headway serve MODEL` would start, and what of it no request could use."""
    try:
        with quiet_stdout():
            config = engine_config(model)
    except Exception as error:
        # Validation errors of vLLM's dataclasses run over many lines.
        message = " ".join(str(error).split())
        return [Finding("can be steered", False, message[:500])]
    from headway.server.engine.config import unsupported_attention, unsupported_request
    from headway.server.engine.geometry import geometry_of

    geometry = geometry_of(config)
    sizes = (
        f"{geometry.num_layers} layers, {geometry.num_heads} heads, "
        f"{geometry.num_kv_heads} KV heads, head size {geometry.head_size}, "
        f"hidden size {geometry.hidden_size}"
    )
    reason, attention = unsupported_request(config), unsupported_attention(config)
    dims = ", ".join(map(str, geometry.sink_dims)) or "none known; see headway calibrate sinks"
    return [
        Finding("can be steered", reason is None, reason or ""),
        Finding("attention weights can be edited", attention is None, attention or ""),
        Finding("sink dimensions, for var", None, dims),
        Finding("architecture", None, geometry.architecture),
        Finding("sizes", None, sizes),
        Finding("images", None, "yes" if geometry.supports_images else "no"),
        Finding("quantized", None, "yes" if geometry.quantized else "no"),
        Finding("worker", None, config.parallel_config.worker_cls),
    ]


def engine_config(model: str) -> Any:
    """The configuration of a Headway engine for the model, as `headway serve` would make it.

    Raises what vLLM raises for a model it does not know, ValueError for one Headway does not.
    """
    from vllm.engine.arg_utils import EngineArgs

    from headway.server.engine import plugin

    plugin.register()
    return EngineArgs(model=model, additional_config={NAME: {}}).create_engine_config()


def refused() -> list[Finding]:
    """What the engine of this version cannot do, and requests with other features in use."""
    missing = sorted(set(Feature) - ENGINE_FEATURES)
    return [
        *(Finding(f"methods that need {name.replace('_', ' ')}", None) for name in missing),
        Finding("steering with speculative decoding or context parallelism", None),
        Finding("steering with beam search or a background response", None),
    ]


def _installed(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, "not installed")


def _triton() -> Finding:
    try:
        with quiet_stdout():
            import triton  # noqa: F401
    except ImportError as error:
        return Finding("triton", False, f"cannot be imported: {error}")
    return _installed("triton")
