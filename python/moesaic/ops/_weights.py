"""How a weight crosses torch.library: as eight flat arguments, for each of the forms a user may
pass.

A weight is a floating Tensor, a QuantTensor or a PackedWeight, of logical shape [..., N, K].  Flat
it is (data, scale, row_scale, poison, global_scale, format, shape, layout) with layout "dense",
"quant", or the name of the packed layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import PackedWeight, QuantFormat, QuantTensor
from . import _check
from .matmul import flat_packed
from .quant import flat

DENSE, QUANT = "dense", "quant"
#: The flat arguments of one weight, in order; in a schema each is prefixed with the weight's name.
FIELDS = ("data", "scale", "row_scale", "poison", "global_scale", "format", "shape", "layout")

Weight = Tensor | QuantTensor | PackedWeight


def schema(name: str) -> str:
    """The arguments of weight ``name`` in a torch schema."""
    return (
        f"Tensor {name}_data, Tensor? {name}_scale, Tensor? {name}_row_scale, "
        f"Tensor? {name}_poison, Tensor? {name}_global_scale, str {name}_format, "
        f"SymInt[] {name}_shape, str {name}_layout"
    )


def flatten(op: str, argument: str, weight: Weight) -> tuple[Any, ...]:
    """The flat arguments of a weight that :func:`check` passed."""
    if isinstance(weight, Tensor):
        return weight, None, None, None, None, DENSE, tuple(weight.shape), DENSE
    if isinstance(weight, QuantTensor):
        data, scale, global_scale, format, shape = flat(op, argument, weight)
        return data, scale, None, None, global_scale, format, shape, QUANT
    return flat_packed(op, argument, weight)


def unflatten(
    data: Tensor, scale: Tensor | None, row_scale: Tensor | None, poison: Tensor | None,
    global_scale: Tensor | None, format: str, shape: list[int], layout: str,
) -> Weight:  # fmt: skip
    """Inverse of :func:`flatten`."""
    if layout == DENSE:
        return data
    if layout == QUANT:
        fmt = QuantFormat.from_string(format)
        return QuantTensor(data, scale, global_scale, fmt, tuple(shape))  # type: ignore[arg-type]
    return PackedWeight(
        data, scale, row_scale, poison, format, tuple(shape), layout, global_scale
    )  # fmt: skip


def check(
    op: str,
    argument: str,
    value: Any,
    shape: tuple[int | None, ...],
    like: Tensor,
    *,
    transposed: bool = False,
) -> Weight:
    """Check that ``value`` is a weight of logical ``shape`` (None = any) on the device of ``like``.

    ``transposed``: a floating tensor holding the last two dimensions swapped; it is returned as a
    view in the usual order.
    """
    if isinstance(value, Tensor):
        held = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        remedy = "" if value.dtype in floating else "Wrap codes and scales in a moesaic.QuantTensor"
        _check.tensor(op, argument, value, shape=held, dtypes=floating, like=like, remedy=remedy)
        return value.transpose(-1, -2) if transposed else value
    if not isinstance(value, (QuantTensor, PackedWeight)):
        expected = "a floating torch.Tensor, a QuantTensor or a PackedWeight"
        _check.fail(op, argument, expected, type(value).__name__, kind=TypeError)
    if transposed:
        got = f"a {type(value).__name__}"
        _check.fail(
            op, argument, "a floating torch.Tensor with transposed=True", got, kind=TypeError
        )
    have = tuple(value.shape)
    fits = len(have) == len(shape) and all(
        want is None or want == size for want, size in zip(shape, have, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        _check.fail(op, argument, f"shape {wanted}", f"{type(value).__name__} {list(have)}")
    if value.device != like.device:
        _check.fail(op, argument, f"a weight on {like.device}", f"one on {value.device}")
    return value
