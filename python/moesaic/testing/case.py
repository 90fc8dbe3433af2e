"""One case of the contract: how to call a public op, how exact the answer must be, what it
costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Exact:
    """Bit for bit: indices, codes, scales, layouts, copies."""


@dataclass(frozen=True)
class Yardstick:
    """Floating results.  With gold = the reference in fp64 and ref = the reference on the same
    inputs,

        |out - gold| <= 2 max|ref - gold| + eps(out dtype) |gold| + floor

    per element, where floor = terms * 2^-24 * max|gold|: the rounding of ``terms`` fp32 operations
    that another summation order may spend where ref happened to be lucky.  NaN and Inf must
    coincide.
    """

    terms: int = 8


Tolerance = Exact | Yardstick


@dataclass(frozen=True)
class Cost:
    """Compulsory work of a call: bytes that must move at least once, and floating operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """A named call of ``moesaic.<op>``.

    make_inputs(seed) returns the keyword arguments of the door, fresh tensors on the CPU every
    time. tolerance is one for all outputs or a tuple with one for each.  mutates names the
    arguments written in place; they count as further outputs.  take_rows(inputs, n) returns the
    inputs of the same call on its first n rows only: outputs must then be bitwise the first n
    rows.  room and op name the definition, moesaic.reference.<room>.<op>.  Tags: "bench" (timed
    instead of tested), "small" (fit for the Triton interpreter), "compile" (checked with opcheck
    and torch.compile; one or two an op).
    """

    id: str
    room: str
    op: str
    make_inputs: Callable[[int], Inputs]
    tolerance: Tolerance | tuple[Tolerance, ...] = field(default_factory=Yardstick)
    cost: Callable[[Inputs], Cost] | None = None
    take_rows: Callable[[Inputs, int], Inputs] | None = None
    rows: int = 0
    mutates: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.op}-{self.id}"

    def run(self, inputs: Inputs, backend: str | None = None) -> tuple[Tensor, ...]:
        """Call the public op; its outputs followed by the mutated arguments."""
        import moesaic

        result = getattr(moesaic, self.op)(**inputs, backend=backend)
        return flatten(result) + tuple(inputs[name] for name in self.mutates)

    def reference(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Call the definition on the inputs as they are (fp64 inputs give the gold result)."""
        module = importlib.import_module(f"moesaic.reference.{self.room}")
        result = getattr(module, self.op)(**inputs)
        return flatten(result) + tuple(inputs[name] for name in self.mutates)

    def tolerances(self, count: int) -> tuple[Tolerance, ...]:
        """One tolerance for each of ``count`` outputs."""
        if isinstance(self.tolerance, tuple):
            if len(self.tolerance) != count:
                raise ValueError(f"{self}: {len(self.tolerance)} tolerances for {count} outputs")
            return self.tolerance
        return (self.tolerance,) * count


def flatten(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, in order: of tuples, QuantTensors and PackedWeights."""
    return tuple(t for t in pytree.tree_leaves(result) if isinstance(t, Tensor))


def to_gold(inputs: Inputs) -> Inputs:
    """The inputs with floating tensors widened to fp64, so that the reference gives the gold
    result.

    FP8 tensors are codes and stay as they are, as does everything inside a QuantTensor.
    """
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return {
        name: value.double() if isinstance(value, Tensor) and value.dtype in wide else value
        for name, value in inputs.items()
    }


def clone(inputs: Inputs) -> Inputs:
    """Copies of all tensors with their strides, so that a call cannot disturb the original."""
    return {k: _clone(v) for k, v in inputs.items()}


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() and (0 in value.stride() or _overlaps(value)):
            return value
        out = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        return out.copy_(value)
    return value


def _overlaps(t: Tensor) -> bool:
    extent = sum((s - 1) * st for s, st in zip(t.shape, t.stride(), strict=True)) + 1
    return extent < t.numel()


def with_tag(cases: Iterable[Case], tag: str) -> list[Case]:
    """The cases that carry ``tag``."""
    return [c for c in cases if tag in c.tags]
