"""Rows of the cpu backend: quant."""
