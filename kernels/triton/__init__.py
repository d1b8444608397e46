"""The GPU kernels, in Triton: the same operations as the CPU kernels, by the same names.

A kernel here is a `@triton.jit` function, a Python function that launches it on tensors, and
`specialisations()`, the compiled variants that matter. With TRITON_INTERPRET=1 in the environment
before the first import they run on CPU tensors: how they are tested where there is no GPU.
"""
