"""Lets vLLM choose its V2 model runner on CPU, with every Triton kernel interpreted.

vLLM looks for a Triton backend named `cpu`, which this registers: a driver that says it is active
and never compiles anything, since the interpreter runs the kernels. It must be called before
`vllm.triton_utils` is first imported, in every process. Tests only: steps take seconds.
"""

from __future__ import annotations

import os
from typing import Any


def install() -> None:
    """Register the backend; TRITON_INTERPRET is set for this process and those it starts."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):
        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            raise RuntimeError("kernels are interpreted here, nothing is compiled")

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("timings of interpreted kernels are no measurements")

    backends.setdefault("cpu", Backend(compiler=None, driver=InterpreterDriver))
