"""Rows of the cpu backend: matmul."""
