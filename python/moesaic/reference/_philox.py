"""Counter-based random bits: the same for the same seed and element on every device and backend."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox_u32(seed: int, index: Tensor) -> Tensor:
    """First word of Philox4x32-10 with key ``seed`` and counter ``(index, index >> 32, 0, 0)``.

    index is int64 of any shape; the result has its shape and holds int64 values in [0, 2**32).
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). ``tl.randint(seed, index)``
    gives the same words.
    """
    c0, c1 = index & _MASK, (index >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p2 >> 32) & _MASK) ^ c1 ^ k0, p2 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK,
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0
