"""Rows of the reference backend: attention."""
