"""Rows of the triton backend: attention."""
