"""Rows of the triton backend: quant."""
