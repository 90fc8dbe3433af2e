"""Doors of the moe room."""
