"""Rows of the triton backend: moe."""
