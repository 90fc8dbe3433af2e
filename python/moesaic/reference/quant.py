"""Definitions of the quant room in plain PyTorch."""
