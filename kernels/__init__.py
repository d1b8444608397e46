"""Kernels over plain tensors. Know neither steering methods nor vLLM nor servers."""
