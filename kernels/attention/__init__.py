"""Triton kernels of the attention room."""
