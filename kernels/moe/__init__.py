"""Triton kernels of the moe room."""
