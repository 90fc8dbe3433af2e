"""Rows of the cpu backend: attention."""
