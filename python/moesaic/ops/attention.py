"""Doors of the attention room."""
