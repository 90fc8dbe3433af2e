"""Plain PyTorch definitions of every op, with the signatures of the public functions.

They compute in fp32, or in fp64 if any floating input is fp64, and are the truth that every other
implementation is tested against.
"""

from . import attention, matmul, moe, quant

__all__ = ["attention", "matmul", "moe", "quant"]
