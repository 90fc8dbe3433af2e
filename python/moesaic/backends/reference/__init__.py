"""The plain PyTorch definitions as a backend: serves every op on every device."""

from . import attention, matmul, moe, quant  # noqa: F401
