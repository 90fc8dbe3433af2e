"""Definitions of the moe room in plain PyTorch."""
