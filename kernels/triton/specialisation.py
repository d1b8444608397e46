"""One compiled variant of a Triton kernel, described without launching it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specialisation:
    """What an ahead-of-time compilation needs to know, and what it must find.

    kernel: name of the module; name: what tells this variant from the kernel's others.
    function: the `@triton.jit` function. signature: type of every argument that is not a constant
    (`*bf16`, `*fp32`, `*i32`, `*u8`, `i32`, `i64`, `fp32`). constants: values of the constexpr
    arguments, and of pointers that are None. aligned: arguments that are divisible by 16, as
    Triton finds out at a launch: pointers and most strides.
    head_size, dtype: what a table of results is sorted by; 0 and "" where they mean nothing.
    tensor_cores: whether the code must hold tensor-core instructions.
    """

    kernel: str
    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    head_size: int = 0
    dtype: str = ""
    tensor_cores: bool = False
