"""Rows of the reference backend: quant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import registry
from ...formats import QuantFormat, QuantTensor
from ...reference import quant as _quant


def _rules(
    format: str, scale: Tensor | None, global_scale: Tensor | None, row_global_scale: bool,
    eps: float, amax_ub: float | None, seed: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The keyword arguments of the definitions, from the flat ones."""
    top: Tensor | str | None = global_scale
    if top is None and row_global_scale:
        top = "row"
    return {
        "format": QuantFormat.from_string(format),
        "scale": scale,
        "global_scale": top,
        "eps": eps,
        "amax_ub": amax_ub,
        "seed": seed,
    }


def _parts(q: QuantTensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """data, scale and the computed global scale, empty if there is none."""
    if q.global_scale is None or given is not None:
        return q.data, q.scale, q.data.new_empty(0, dtype=torch.float32)
    return q.data, q.scale, q.global_scale


def _quantize(x: Tensor, *rules: Any) -> tuple[Tensor, ...]:
    return _parts(_quant.quantize(x, **_rules(*rules)), rules[2])


def _dequantize(
    data: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, shape: list[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    q = QuantTensor(data, scale, global_scale, QuantFormat.from_string(format), tuple(shape))
    return _quant.dequantize(q, dtype)


def _rms_norm_quantize(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_eps: float, return_norm: bool,
    *rules: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    result = _quant.rms_norm_quantize(
        x, weight, norm_eps=norm_eps, residual=residual, return_norm=return_norm, **_rules(*rules)
    )
    q, *extra = result if isinstance(result, tuple) else (result,)
    outputs = iter(extra)
    hidden = x.new_empty(0) if residual is None else next(outputs)
    norm = next(outputs) if return_norm else x.new_empty(0)
    return (*_parts(q, rules[2]), hidden, norm)


def _silu_mul_quantize(
    x: Tensor, activation: str, alpha: float | None, limit: float | None, interleaved: bool,
    *rules: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    q = _quant.silu_mul_quantize(
        x,
        activation=activation,
        alpha=alpha,
        limit=limit,
        interleaved=interleaved,
        **_rules(*rules),
    )
    return _parts(q, rules[2])


registry.implement("quantize", "reference", _quantize)
registry.implement("dequantize", "reference", _dequantize)
registry.implement("rms_norm_quantize", "reference", _rms_norm_quantize)
registry.implement("silu_mul_quantize", "reference", _silu_mul_quantize)
