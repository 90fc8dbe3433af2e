"""Rows of the reference backend: moe."""
