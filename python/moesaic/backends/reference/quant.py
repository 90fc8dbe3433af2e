"""Rows of the reference backend: quant."""
