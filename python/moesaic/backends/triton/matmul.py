"""Rows of the triton backend: matmul."""
