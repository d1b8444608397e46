"""Builds the CPU kernels with the package; everything else is in pyproject.toml.

Plain C libraries that are loaded with ctypes, so that they need a C compiler but no Python headers.
Where there is no compiler the installation goes on without them: Headway on CPU then refuses
requests that edit attention weights, and leaves linear gradients and products with the cache to
torch.
"""

from setuptools import Extension, setup


def kernel(name: str) -> Extension:
    """The library `headway.kernels._<name>`, made of `kernels/<name>.c`."""
    return Extension(
        f"headway.kernels._{name}",
        [f"kernels/{name}.c"],
        depends=["kernels/cpu_vectors.h"],
        # Not linked against an OpenMP library: torch has loaded one, whose threads it shares.
        extra_compile_args=["-std=gnu11", "-O3", "-g0", "-fopenmp", "-fno-math-errno"],
        optional=True,
    )


KERNELS = (
    "segment_attention",
    "linear_grad",
    "cache_products",
    "row_gradients",
    "residual_edit",
)

setup(ext_modules=[kernel(name) for name in KERNELS])
