"""Rows of the reference backend: matmul."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import registry
from ...formats import PackedWeight, QuantFormat, QuantTensor
from ...reference import matmul as _matmul


def packed_weight(
    data: Tensor, scale: Tensor | None, row_scale: Tensor | None, poison: Tensor | None,
    global_scale: Tensor | None, format: str, shape: list[int], layout: str,
) -> PackedWeight:  # fmt: skip
    """A PackedWeight from the flat arguments of the schemas."""
    return PackedWeight(
        data, scale, row_scale, poison, format, tuple(shape), layout, global_scale=global_scale
    )


def quantized(
    data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, shape: list[int]
) -> QuantTensor:
    """A QuantTensor from the flat arguments of the schemas."""
    return QuantTensor(data, scale, global_scale, QuantFormat.from_string(format), tuple(shape))


def _pack_weight(
    data: Tensor, scale: Tensor | None, global_scale: Tensor | None, format: str, shape: list[int]
) -> PackedWeight:
    if scale is None:
        return _matmul.pack_weight(data)
    return _matmul.pack_weight(quantized(data, scale, global_scale, format, shape))


def _why_not_unpack(*packed: Any) -> str | None:
    layout = packed[7]
    return None if layout == "plain" else f"the weight was packed as {layout!r}, not 'plain'"


def _unpack_weight(*packed: Any) -> QuantTensor | Tensor:
    return _matmul.unpack_weight(packed_weight(*packed))


def _quant_linear(x: Tensor, *rest: Any) -> Tensor:
    *packed, bias, activation, out_dtype = rest
    how = QuantFormat.from_string(activation) if ":" in activation else activation or None
    return _matmul.quant_linear(
        x, packed_weight(*packed), bias, activation=how, out_dtype=out_dtype
    )


def _scaled_mm(*args: Any) -> Tensor:
    *operands, bias, out_dtype = args
    a, b = quantized(*operands[:5]), quantized(*operands[5:])
    return _matmul.scaled_mm(a, b, bias, out_dtype=out_dtype)


registry.implement("pack_weight", "reference", _pack_weight)
registry.implement("unpack_weight", "reference", _unpack_weight, _why_not_unpack)
registry.implement("quant_linear", "reference", _quant_linear)
registry.implement("scaled_mm", "reference", _scaled_mm)
