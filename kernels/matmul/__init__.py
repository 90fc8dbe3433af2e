"""Triton kernels of the matmul room."""
