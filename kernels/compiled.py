"""The CPU kernels in C, which are compiled when Headway is installed."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec


def compiled_path(name: str) -> str | None:
    """Where the library made of `kernels/<name>.c` is, None if this installation has none."""
    spec = find_spec(f"headway.kernels._{name}")
    return spec.origin if spec else None


@lru_cache
def compiled_library(name: str) -> ctypes.CDLL | None:
    """That library, None if this installation has none."""
    path = compiled_path(name)
    return ctypes.CDLL(path) if path else None
