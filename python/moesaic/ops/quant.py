"""Doors of the quant room."""
