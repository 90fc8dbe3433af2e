"""moesaic: fused MoE, FP8/FP4 quantized matmul and paged attention for PyTorch.

Every op has one definition (``moesaic.reference``, plain PyTorch) and several implementations (C++
SIMD on CPUs, Triton on GPUs) that agree with it.  ``moesaic.explain("op", ...)`` says which one a
call would use and why.
"""

import torch  # noqa: F401  (first: the extension shares the OpenMP runtime that torch loads)

from .registry import explain, implementations, load_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "explain",
    "implementations",
    "use_backend",
]

load_backends()
