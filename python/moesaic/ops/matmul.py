"""Doors of the matmul room."""
