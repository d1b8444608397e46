"""Triton's kernels run under its interpreter: that is decided when they are first imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")


def multiply_bfloat16() -> None:
    """Triton 3.9's interpreter keeps bfloat16 as integers and `tl.dot` multiplies those."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *args):
        def widen(x):
            return self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

        return original(self, widen(a), widen(b), *args)

    InterpreterBuilder.create_dot = create_dot


multiply_bfloat16()
