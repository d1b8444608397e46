"""Builds the CPU attention kernel with the package; everything else is in pyproject.toml.

A plain C library that is loaded with ctypes, so that it needs a C compiler but no Python headers.
Where there is no compiler the installation goes on without it, and Headway on CPU refuses requests
that edit attention weights.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "headway.kernels._segment_attention",
            ["kernels/segment_attention.c"],
            depends=["kernels/cpu_vectors.h"],
            # Not linked against an OpenMP library: torch has loaded one, whose threads it shares.
            extra_compile_args=["-std=gnu11", "-O3", "-g0", "-fopenmp", "-fno-math-errno"],
            optional=True,
        )
    ]
)
