"""Whether the installed vLLM has every symbol that Headway's engine relies on.

A vLLM release that moves one of them is caught here, by name, before it can serve a request
unsteered. `headway doctor` prints the list; a contract test checks each entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from headway.server.engine.seam_attributes import ATTRIBUTES
from headway.server.engine.seam_list import CPU_MODULES, SEAMS, Seam

SUPPORTED = "0.32."
"""Prefix of the vLLM versions that Headway supports."""


@dataclass(frozen=True)
class SeamCheck:
    """What the check of one seam found."""

    name: str
    ok: bool
    detail: str = ""


def check_seams() -> list[SeamCheck]:
    """Check every seam against the installed vLLM, those of its CPU worker only on CPU.

    Raises nothing but the ImportError of a missing vLLM.
    """
    from vllm.platforms import current_platform

    left_out = () if current_platform.is_cpu() else CPU_MODULES
    checks = [_version()]
    checks += [_check(seam) for seam in SEAMS if seam.module not in left_out]
    checks += [_check_source(*entry) for entry in ATTRIBUTES if entry[0] not in left_out]
    return checks


def _version() -> SeamCheck:
    import vllm

    version = vllm.__version__
    supported = version.startswith(SUPPORTED)
    return SeamCheck("vllm.__version__", supported, f"{version}; supported: {SUPPORTED}x")


def _check(seam: Seam) -> SeamCheck:
    try:
        missing = set(seam.needs) - set(_names(_resolve(seam.module, seam.path)))
    except (ImportError, AttributeError) as error:
        return SeamCheck(seam.name, False, str(error))
    detail = f"lacks {', '.join(sorted(missing))}" if missing else ""
    return SeamCheck(seam.name, not missing, detail)


def _check_source(module: str, name: str, words: Sequence[str]) -> SeamCheck:
    try:
        source = inspect.getsource(_resolve(module, name))
    except (ImportError, AttributeError, OSError) as error:
        return SeamCheck(f"{module}.{name}", False, str(error))
    missing = [word for word in words if word not in source]
    detail = f"its source lacks {', '.join(missing)}" if missing else ""
    return SeamCheck(f"{module}.{name} (source)", not missing, detail)


def _resolve(module: str, path: str) -> Any:
    value = import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _names(value: Any) -> list[str]:
    """Parameters of a callable; of a class, its fields and constructor parameters too."""
    names: list[str] = []
    if inspect.isclass(value):
        names += getattr(value, "__dataclass_fields__", {})
        names += getattr(value, "__struct_fields__", ())
    if callable(value):
        # Exceptions made in C have no signature, and we ask nothing of theirs.
        with suppress(ValueError):
            names += inspect.signature(value).parameters
    return names
