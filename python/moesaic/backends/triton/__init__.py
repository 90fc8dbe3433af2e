"""Triton kernels (kernels/) for GPUs, and for CPU tensors under TRITON_INTERPRET=1 when forced."""

from __future__ import annotations

import importlib.util

available = importlib.util.find_spec("triton") is not None


def describe() -> str:
    """The Triton version, for ``moesaic.explain``."""
    if not available:
        return ""
    from importlib.metadata import version

    return f"triton {version('triton')}"


if available:
    from . import attention, matmul, moe, quant  # noqa: F401
