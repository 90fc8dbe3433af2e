"""Triton kernels.  Each room (moe, matmul, attention, quant) lives in kernels/<room> at the root of
the repository and is mapped in here by setup.py."""
