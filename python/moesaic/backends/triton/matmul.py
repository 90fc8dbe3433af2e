"""Rows of the triton backend: matmul.  Its packed layout is "plain", the order of QuantTensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import registry
from ...formats import PackedWeight, QuantFormat, QuantTensor
from ...reference import matmul as reference
from ..reference.matmul import packed_weight
from ._launch import FLOATS, on_its_device, short, why_not_device, why_not_floats

_FP8 = ("e4m3fn", "e5m2")


def _why_not_layout(layout: str) -> str | None:
    return None if layout == "plain" else f"the weight was packed as {layout!r}, not 'plain'"


def _why_not_weight(format: str, shape: list[int]) -> str | None:
    from ...kernels.matmul.weight_only import BLOCK_K

    if format.startswith("dense:"):
        return "no Triton kernel for dense weights"
    fmt = QuantFormat.from_string(format)
    mxfp4 = (fmt.element, fmt.block, fmt.scale) == ("e2m1", (1, 32), "e8m0")
    columns = fmt.block[1]
    fp8 = fmt.element in _FP8 and (columns == -1 or columns % BLOCK_K == 0) and fmt.scale != "e4m3"
    if not (mxfp4 or fp8) or fmt.global_scale:
        return f"no Triton kernel for {fmt.element} weights in blocks of {fmt.block}"
    if len(shape) != 2:
        return "no Triton kernel for weights with leading dimensions"
    return None


def _why_not_pack(
    data: Tensor, scale: Tensor | None, global_scale: Tensor | None, format: str, shape: list[int]
) -> str | None:
    return why_not_device(data) or _why_not_weight(format, shape)


def _pack_weight(
    data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, shape: list[int]
) -> PackedWeight:
    fmt = QuantFormat.from_string(format)
    return reference.pack_weight(QuantTensor(data, scale, global_scale, fmt, tuple(shape)))


def _why_not_linear(
    x: Tensor, data: Tensor, scale: Tensor | None, row_scale: Tensor | None, poison: Tensor | None,
    global_scale: Tensor | None, format: str, shape: list[int], layout: str, bias: Tensor | None,
    activation: str, out_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    if activation:
        return f"no Triton kernel for {activation} activations"
    if out_dtype not in FLOATS:
        return f"it writes float32, bfloat16 and float16, not {short(out_dtype)}"
    return (
        why_not_device(x)
        or _why_not_layout(layout)
        or _why_not_weight(format, shape)
        or why_not_floats(x, bias)
    )


def _quant_linear(x: Tensor, data: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    from ...kernels.matmul.w4a16 import mxfp4_linear
    from ...kernels.matmul.w8a16 import fp8_linear

    fmt = QuantFormat.from_string(rest[3])
    bias, _, out_dtype = rest[-3:]
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if fmt.element in _FP8:
        element, block = fmt.element, fmt.block
        out = fp8_linear(rows, data, scale, bias, out_dtype, element=element, block=block)
    else:
        out = mxfp4_linear(rows, data, scale, bias, out_dtype)
    return out.view(*x.shape[:-1], data.shape[0])


def _why_not_unpack(*packed: Any) -> str | None:
    return why_not_device(packed[0]) or _why_not_layout(packed[7])


def _unpack_weight(*packed: Any) -> QuantTensor | Tensor:
    return reference.unpack_weight(packed_weight(*packed))


registry.implement("pack_weight", "triton", _pack_weight, _why_not_pack)
registry.implement("unpack_weight", "triton", _unpack_weight, _why_not_unpack)
registry.implement("quant_linear", "triton", on_its_device(_quant_linear), _why_not_linear)
