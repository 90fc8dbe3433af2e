"""Definitions of the attention room in plain PyTorch."""
