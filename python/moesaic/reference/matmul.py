"""Definitions of the matmul room in plain PyTorch.

Two kinds of matmul. *Weight-only*: activations keep their values, weights decode exactly.
*Quantized activations*: ``x`` is first quantized by the same rules as :func:`moesaic.quantize`, and
its codes and scales are part of the definition. In both, sums are fp32 (only their order is free;
fp64 for fp64 inputs), the bias is added in fp32, and the result is rounded once to the output
dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import INT8, PackedWeight, QuantFormat, QuantTensor
from .quant import dequantize, fake_quantize, straight_through

#: Largest code of "int16" activations: two int8 planes, 256 * high + low, of at most 127 each.
INT16_MAX = 127 * 256 + 127
_INT_BLOCK = 32


def pack_weight(weight: QuantTensor | Tensor) -> PackedWeight:
    """A weight [..., N, K], quantized or floating, in a backend's own layout.

    The reference keeps the order of the plain form: ``data`` holds its bytes, uint8 [..., N, bytes
    of a row], and the scales are as they were.
    """
    if isinstance(weight, QuantTensor):
        data = weight.data.contiguous().view(torch.uint8)
        return PackedWeight(
            data=data,
            scale=weight.scale,
            row_scale=None,
            poison=None,
            format=str(weight.format),
            shape=weight.shape,
            layout="plain",
            global_scale=weight.global_scale,
        )
    return PackedWeight(
        data=weight.contiguous().view(torch.uint8),
        scale=None,
        row_scale=None,
        poison=None,
        format="dense:" + str(weight.dtype).removeprefix("torch."),
        shape=tuple(weight.shape),
        layout="plain",
    )


def unpack_weight(packed: PackedWeight) -> QuantTensor | Tensor:
    """What was given to :func:`pack_weight`, bit for bit.

    A weight in another backend's layout is undone by that backend.
    """
    if packed.layout != "plain":
        from ..ops.matmul import unpack_by_layout

        return unpack_by_layout(packed)
    if packed.format.startswith("dense:"):
        return packed.data.view(getattr(torch, packed.format.removeprefix("dense:")))
    if packed.scale is None:
        raise ValueError("unpack_weight: packed: expected scales for a quantized format, got None")
    format = QuantFormat.from_string(packed.format)
    data = packed.data.view(format.data_dtype)
    return QuantTensor(data, packed.scale, packed.global_scale, format, packed.shape)


def quant_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | QuantFormat | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ weight.T + bias``; x [..., K] floating, weight [N, K] packed, bias [N]: [..., N].

    activation: how x is quantized first. None: not at all. "int8": per 32 of K to int8 with an fp32
        scale, amax / 127 (the INT8 format). "int16": the same with scale amax / 32639, codes that
        split into two int8 planes, near-lossless. A QuantFormat with blocks of one row: that
        format.
    out_dtype: dtype of the result, that of x unless given.
    """
    work = _work_dtype(x, bias, out_dtype)
    plain = unpack_weight(weight)
    w = dequantize(plain, work) if isinstance(plain, QuantTensor) else plain.to(work)
    return _linear(quantized_activations(x, activation).to(work), w, bias, out_dtype or x.dtype)


def scaled_mm(
    a: QuantTensor,
    b: QuantTensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``a @ b.T + bias`` of two quantized matrices; a [..., M, K], b [N, K], bias [N]: [..., M, N].

    The formats may differ, and so may their blocks. fp32 sums (fp64 for ``out_dtype=float64``),
    bias added in fp32, one rounding to ``out_dtype``.
    """
    work = torch.float64 if out_dtype == torch.float64 else torch.float32
    return _linear(dequantize(a, work), dequantize(b, work), bias, out_dtype)


def _work_dtype(x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    dtypes = (x.dtype, None if bias is None else bias.dtype, out_dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    out = x @ w.transpose(-1, -2)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(out_dtype)


def quantized_activations(x: Tensor, activation: str | QuantFormat | None) -> Tensor:
    """The values that quantizing x keeps, in fp32 or wider."""
    if activation is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    if activation == "int16":
        return _fake_int16(wide)
    return fake_quantize(wide, INT8 if isinstance(activation, str) else activation)


def _fake_int16(x: Tensor) -> Tensor:
    """x through int16 codes per 32 of K, by the rules of the INT8 format with another largest code.

    Straight-through gradient, as fake_quantize.
    """
    k = x.shape[-1]
    wide = torch.nn.functional.pad(x.detach().float(), (0, -k % _INT_BLOCK))
    blocks = wide.unflatten(-1, (wide.shape[-1] // _INT_BLOCK, _INT_BLOCK))
    limits = torch.finfo(torch.float32)
    amax = blocks.abs().nan_to_num(nan=0.0, posinf=limits.max).amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, (amax / INT16_MAX).clamp(min=limits.tiny))
    codes = (blocks / scale).clamp(-INT16_MAX, INT16_MAX).round()
    poison = blocks.isnan().any(-1, keepdim=True)
    values = (codes.to(x.dtype) * scale.to(x.dtype)).masked_fill(poison, float("nan"))
    return straight_through(x, values.flatten(-2)[..., :k])
