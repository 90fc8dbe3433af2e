"""Definitions of the matmul room in plain PyTorch."""
