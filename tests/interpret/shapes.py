"""Seeded random choices for the fuzz tests."""

import torch
from torch import Tensor


class Draw:
    """Random choices that one seed repeats."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def pick(self, *options):
        return options[self.integer(0, len(options) - 1)]

    def chance(self, one_in: int) -> bool:
        return self.integer(1, one_in) == 1

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def bytes(self, *shape: int, low: int = 0, high: int = 255) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.uint8)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def strided(self, x: Tensor) -> Tensor:
        """The same values, contiguous or as a view with gaps between the rows."""
        if self.chance(2):
            return x
        wide = torch.empty(*x.shape[:-1], x.shape[-1] + self.integer(1, 9), dtype=x.dtype)
        wide.view(torch.uint8).fill_(0xFF)  # NaN in every floating format
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
