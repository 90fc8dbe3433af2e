"""C++ SIMD kernels for CPUs (csrc/).  Absent from a pure-Python install (MOESAIC_NO_CPP=1)."""

from __future__ import annotations

import importlib
from typing import Any

import torch  # noqa: F401  (before _C, so that both use the OpenMP runtime that torch loads)

_C: Any
try:
    _C = importlib.import_module("moesaic._C")
except ModuleNotFoundError as error:  # not built; any other failure of the import is a defect
    if error.name != "moesaic._C":
        raise
    _C = None

#: The module moesaic._C, or None.
extension: Any = _C


def describe() -> str:
    """The instruction set in use, for ``moesaic.explain``."""
    return f"isa {_C.isa()}" if _C is not None else ""


if _C is not None:
    from . import attention, matmul, moe, quant  # noqa: F401
