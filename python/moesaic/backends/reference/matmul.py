"""Rows of the reference backend: matmul."""
