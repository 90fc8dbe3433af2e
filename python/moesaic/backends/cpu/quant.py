"""Rows of the cpu backend: quant.  Codes and scales in C++; the producers' norms in torch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import registry
from ...formats import QuantFormat
from ...reference import quant as _reference
from . import extension as _C
from ._dtypes import DTYPE, address

# Enums of csrc/include/moesaic/quant.h.
_ELEMENT = {
    name: code
    for code, name in enumerate(
        ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e2m1", "e2m3", "e3m2", "int8")
    )
}
_SCALE = {"fp32": 0, "e8m0": 1, "e4m3": 2}
_RULE = {"exact": 0, "floor": 1, "rceil": 2, "even": 3, "ceil": 4}


@lru_cache(maxsize=256)
def _block_format(format: QuantFormat) -> Any:
    rows, cols = (0 if b == -1 else b for b in format.block)
    return _C.BlockFormat(
        _ELEMENT[format.element], _SCALE[format.scale], _RULE[format.scale_rule], rows, cols
    )


def _why_not_format(format: QuantFormat) -> str | None:
    if format.element == "e2m1" and format.block[1] != -1 and format.block[1] % 2:
        return f"FP4 blocks of {format.block[1]} columns do not start at whole bytes"
    return None


def _why_not_quantize(x: Tensor, spec: str, scale: Tensor | None, *rules: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    format = QuantFormat.from_string(spec)
    if format.rounding != "rne":
        return f"{format.rounding} rounding has no kernel"
    if format.four_over_six and scale is None:
        return "choosing four-over-six scales has no kernel"
    return _why_not_format(format)


def _matrix(x: Tensor) -> Tensor:
    """x as [batch, n, k] of fp32, bf16 or fp16 with a contiguous last dimension."""
    if x.dtype == torch.float64:
        x = x.float()
    *lead, n, k = x.shape if x.ndim > 1 else (1, *x.shape)
    x = x.reshape(math.prod(lead), n, k)
    return x if x.stride(-1) == 1 or k <= 1 else x.contiguous()


def _row_amax(x: Tensor) -> Tensor:
    """[batch, n, 1] fp32: largest magnitude of each row, as the definition counts NaN and Inf."""
    batch, n, k = x.shape
    amax = torch.empty(batch, n, 1)
    _C.row_amax(
        x.data_ptr(), DTYPE[x.dtype], batch, n, k, x.stride(0), x.stride(1), amax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return amax


def _amax(x: Tensor, per_row: bool, eps: float, amax_ub: float | None) -> Tensor:
    amax = _row_amax(x)
    if not per_row:
        amax = amax.amax(1, keepdim=True) if x.shape[1] else amax.new_zeros(x.shape[0], 1, 1)
    return amax.clamp(min=eps, max=amax_ub)


def _global_arguments(value: Tensor | None, batch: int, n: int, lead: tuple[int, ...]) -> tuple:
    """Address and strides of a global scale seen as [batch, n], and the tensor that owns them."""
    if value is None:
        return (0, 0, 0), None
    view = value.expand(*lead, n, 1)
    if len(lead) > 1:
        view = view.reshape(batch, n, 1)  # copies only where the leading dimensions do not merge
    rows = view.reshape(batch, n, 1) if not lead else view
    return (address(rows), rows.stride(0), rows.stride(1)), rows


def _quantize(
    x: Tensor, spec: str, scale: Tensor | None, global_scale: Tensor | None, row_global_scale: bool,
    eps: float, amax_ub: float | None, seed: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    format = QuantFormat.from_string(spec)
    shape = tuple(x.shape) if x.ndim > 1 else (1, *x.shape)
    rows = _matrix(x)
    batch, n, k = rows.shape
    lead = shape[:-2]
    computed = torch.empty(0)
    if format.global_scale and global_scale is None:
        amax = _amax(rows, row_global_scale, eps, amax_ub)
        computed = _reference.global_scale_of(amax, format).reshape(*lead, amax.shape[1], 1)
        global_scale = computed
    grid = format.scale_shape(shape)
    static = scale is not None
    if scale is None and format.block == (-1, -1) and format.element_type.nan_code is not None:
        # One block: find its amax in parallel, then encode with a given scale.
        amax = _amax(rows, False, eps, amax_ub).reshape(grid)
        scale, static = _reference.block_scale(amax, global_scale, format, format.max), True
    data = torch.empty(format.data_shape(shape), dtype=format.data_dtype)
    out_scale = torch.empty(grid, dtype=format.scale_dtype)
    if scale is not None:
        out_scale.copy_(scale)
    top, owner = _global_arguments(global_scale, batch, n, lead)
    _C.quantize(
        _block_format(format), rows.data_ptr(), DTYPE[rows.dtype], batch, n, k,
        rows.stride(0), rows.stride(1), static, eps, math.inf if amax_ub is None else amax_ub, *top,
        data.data_ptr(), out_scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del owner
    return data, out_scale, computed


def _why_not_dequantize(
    data: Tensor, scale: Tensor, global_scale: Tensor | None, spec: str, *rest: Any
) -> str | None:
    if data.device.type != "cpu":
        return f"q is on {data.device}"
    if rest[-1] == torch.float64:
        return "float64 values have no kernel"
    return _why_not_format(QuantFormat.from_string(spec))


def _dequantize(
    data: Tensor, scale: Tensor, global_scale: Tensor | None, spec: str, shape: list[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    format = QuantFormat.from_string(spec)
    *lead, n, k = shape
    batch = math.prod(lead)
    data, scale = data.contiguous(), scale.contiguous()
    out = torch.empty(tuple(shape), dtype=dtype)
    top, owner = _global_arguments(global_scale, batch, n, tuple(lead))
    _C.dequantize(
        _block_format(format), batch, n, k, data.data_ptr(), scale.data_ptr(), *top,
        out.data_ptr(), DTYPE[dtype], torch.get_num_threads(),
    )  # fmt: skip
    del owner
    return out


def _rms_norm_quantize(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_eps: float, return_norm: bool,
    *rules: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    hidden, norm = _reference.rms_norm(x, weight, residual, norm_eps)
    return (
        *_quantize(norm, *rules),
        x.new_empty(0) if residual is None else hidden,
        norm if return_norm else x.new_empty(0),
    )


def _silu_mul_quantize(
    x: Tensor, activation: str, alpha: float | None, limit: float | None, interleaved: bool,
    *rules: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _quantize(_reference.gated(x, activation, alpha, limit, interleaved), *rules)


if _C is not None:
    registry.implement("quantize", "cpu", _quantize, _why_not_quantize)
    registry.implement("dequantize", "cpu", _dequantize, _why_not_dequantize)
    registry.implement(
        "rms_norm_quantize", "cpu", _rms_norm_quantize,
        lambda x, weight, residual, norm_eps, return_norm, *rules: _why_not_quantize(x, *rules),
    )  # fmt: skip
    registry.implement(
        "silu_mul_quantize", "cpu", _silu_mul_quantize,
        lambda x, activation, alpha, limit, interleaved, *rules: _why_not_quantize(x, *rules),
    )  # fmt: skip
