"""Rows of the cpu backend: moe."""
