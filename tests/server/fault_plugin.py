"""A vLLM plugin that makes a server fail where it is told to; only tests install it.

`installed` puts it beside the server, on PYTHONPATH, as a distribution with an entry point: vLLM
loads it in every one of its processes, and nothing of it is part of Headway. What fails is told by
numbers in the steering of one request, so that its neighbours stay what they are, or by files in
the folder that the environment variable names, so that a test can switch it on and off.
"""

from __future__ import annotations

import errno
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

NAME = "headway_test_faults"
VARIABLE = "HEADWAY_TEST_FAULTS"

COMPILE_RAISES, KERNEL_RAISES, BECOMES_NAN = 3.125, 3.25, 3.5
"""Scales of `head_scale`."""

UPLOAD, REPORT, DISK = "upload", "report", "disk"
"""Names of files: vectors cannot be loaded, reports cannot be told, the registry's disk is full."""

SECRET = "/etc/secret"
"""In the text of every error; no client may see it."""


def installed(folder: Path) -> dict[str, str]:
    """Write the plugin into a folder; returns the environment of a server that loads it."""
    (folder / "switches").mkdir(parents=True)
    shutil.copy(__file__, folder / f"{NAME}.py")
    info = folder / f"{NAME}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{NAME} = {NAME}:install\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_PLUGINS": f"headway,{NAME}",
        VARIABLE: str(folder / "switches"),
    }


def is_on(fault: str) -> bool:
    return (Path(os.environ[VARIABLE]) / fault).exists()


def install() -> None:
    """The entry point."""
    fail_in_compile(import_module("headway.steering.compile"))
    fail_in_kernel(import_module("headway.server.engine.cpu_plan"))
    rpc = import_module("headway.server.engine.worker_rpc").SteeringRpc
    fail_when(rpc, "headway_load_artifacts", UPLOAD, RuntimeError(SECRET))
    fail_when(rpc, "headway_pop_report", REPORT, RuntimeError(SECRET))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), SECRET)
    for name in ("write_new", "write_over"):
        fail_when(import_module("headway.server.registry.store"), name, DISK, full)


def fail_when(owner: Any, name: str, fault: str, error: Exception) -> None:
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if is_on(fault):
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def fail_in_compile(module: Any) -> None:
    original = module.parse_method

    def parse_method(value: Any, *args: Any) -> Any:
        if any(scale[-1] == COMPILE_RAISES for scale in value.get("scales", ())):
            raise KeyError(SECRET)
        return original(value, *args)

    module.parse_method = parse_method


def fail_in_kernel(module: Any) -> None:
    original = module.head_affine_

    def head_affine_(z: Any, rows: Any, scale: Any, shift: Any = None) -> None:
        if (scale == KERNEL_RAISES).any():
            raise RuntimeError("injected")
        original(z, rows, scale, shift)
        spoiled = (scale == BECOMES_NAN).any(dim=-1)
        if spoiled.any():
            part = z[rows]
            part[spoiled] = float("nan")
            z[rows] = part

    module.head_affine_ = head_affine_
