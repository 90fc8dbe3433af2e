"""Rows of the cpu backend: matmul.

The packed layout is that of csrc/include/moesaic/matmul.h, on every instruction set, under the name
``"cpu-panels"``.  Codes are rearranged in C++, scales (a few percent of the bytes) here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ... import registry
from ...formats import PackedWeight, QuantFormat, QuantTensor, e8m0_values
from ...reference import matmul as _reference
from ...reference.quant import dequantize
from ..reference.matmul import packed_weight, quantized
from . import extension
from ._dtypes import DTYPE, address

_C: Any = extension
LAYOUT = "cpu-panels"
PANEL = 16
#: Formats whose scale covers a whole row are summed in blocks of this many k, as are dense weights.
DEFAULT_BLOCK = 128
MAX_BLOCK = 256

_NONE, _E8M0, _E4M3, _FLOAT32, _SHARED = range(5)  # ScaleKind
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DENSE = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}
_E2M1 = 5


@dataclass(frozen=True)
class _Plan:
    """How a format is packed: everything about PackedMatrix that the format alone decides."""

    element: int  # DType
    scale_kind: int
    block: int
    scale_panels: int  # panels that share a scale; 0: all of them (or none)
    unit: float
    nan: tuple[int, int] | None  # (mask, code) of the NaN codes that decoding loses


def why_not_format(spec: str) -> str | None:
    """None if weights of this format (a QuantFormat's string or "dense:<dtype>") can be packed."""
    plan = _plan(spec)
    return plan if isinstance(plan, str) else None


def _served(spec: str) -> _Plan:
    plan = _plan(spec)
    if isinstance(plan, str):
        raise NotImplementedError(f"pack_weight: weight: {plan}")
    return plan


@lru_cache(maxsize=256)
def _plan(spec: str) -> _Plan | str:
    """The plan for a format, or the reason why there is none."""
    if spec.startswith("dense:"):
        dtype = _DENSE.get(spec.removeprefix("dense:"))
        if dtype is None:
            return f"dense weights are packed from {', '.join(_DENSE)}, not {spec[6:]}"
        return _Plan(DTYPE[dtype], _NONE, DEFAULT_BLOCK, 0, 1.0, None)
    fmt = QuantFormat.from_string(spec)
    # E4M3 codes decode to value / 256, its FNUZ twin's (with a bias of 8) to value / 128.
    elements = {
        "e2m1": (_E2M1, 1.0, None),
        "e4m3fn": (DTYPE[torch.float8_e4m3fn], 256.0, (0x7F, 0x7F)),
        "e4m3fnuz": (DTYPE[torch.float8_e4m3fn], 128.0, (0xFF, 0x80)),
        "e5m2": (DTYPE[torch.float8_e5m2], 1.0, None),
        "int8": (DTYPE[torch.int8], fmt.code_unit, None),
    }
    if fmt.element not in elements:
        return f"no kernel decodes {fmt.element} weights"
    element, unit, nan = elements[fmt.element]
    rows, cols = fmt.block
    if cols == -1:
        if fmt.scale != "fp32":
            return f"{fmt.scale} scales over whole rows are not packed"
        return _Plan(element, _NONE, DEFAULT_BLOCK, 0, unit, nan)
    if cols % 4 or cols > MAX_BLOCK:
        return f"blocks of {cols} columns; packed are multiples of 4 up to {MAX_BLOCK}"
    if rows == 1:
        kind = {"fp32": _FLOAT32, "e8m0": _E8M0, "e4m3": _E4M3}[fmt.scale]
        unit *= 256.0 if kind == _E4M3 else 1.0
        return _Plan(element, kind, cols, 0, unit, nan)
    if rows != -1 and rows % PANEL:
        return f"blocks of {rows} rows; packed are 1, multiples of {PANEL}, or all rows"
    return _Plan(element, _SHARED, cols, max(rows, 0) // PANEL, unit, nan)


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(experts, N, K, panels)."""
    *lead, n, k = shape
    return prod(lead), n, k, -(-n // PANEL)


def pack(weight: QuantTensor | Tensor) -> PackedWeight:
    """A weight [..., N, K] as panels; its format must pass :func:`why_not_format`."""
    if isinstance(weight, QuantTensor):
        plain, spec, shape = weight.data, str(weight.format), tuple(weight.shape)
    else:
        plain, shape = weight, tuple(weight.shape)
        spec = "dense:" + str(weight.dtype).removeprefix("torch.")
    plan = _served(spec)
    experts, n, k, panels = _grid(shape)
    plain = plain.contiguous()
    size = experts * panels * -(-k // 4) * _C.group_bytes(plan.element)
    data = torch.empty(*shape[:-2], size // max(experts, 1), dtype=torch.uint8)
    poison = torch.empty(*shape[:-2], panels * PANEL) if plan.nan else None
    mask, code = plan.nan or (0, 0)
    _C.pack_codes(
        plan.element, experts, n, k, plain.data_ptr(), data.data_ptr(), address(poison), mask, code,
        torch.get_num_threads(),
    )  # fmt: skip
    scale = row_scale = global_scale = None
    if isinstance(weight, QuantTensor):
        scale, row_scale, nan_rows = _pack_scales(weight, plan, panels)
        global_scale = weight.global_scale
        if nan_rows is not None and nan_rows.any():
            poison = torch.zeros(nan_rows.shape) if poison is None else poison
            poison = poison.masked_fill(nan_rows, float("nan"))
    if poison is not None and not poison.isnan().any():
        poison = None
    return PackedWeight(data, scale, row_scale, poison, spec, shape, LAYOUT, global_scale)


def _pack_scales(
    q: QuantTensor, plan: _Plan, panels: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(scale, row_scale, outputs whose scales hold a NaN code), all in panel order or None."""
    n, padding = q.shape[-2], panels * PANEL - q.shape[-2]
    row_scale = None
    if q.global_scale is not None:
        per_row = q.global_scale.reshape(
            q.global_scale.shape if q.global_scale.ndim else (1,) * len(q.shape)
        ).expand(*q.shape[:-1], 1)
        row_scale = pad(per_row[..., 0], (0, padding)).contiguous()
    if plan.scale_kind == _NONE:
        rows = q.format.block[0]
        if rows == -1:  # kept even where there are no outputs
            return None, q.scale[..., 0].expand(*q.shape[:-2], max(panels, 1) * PANEL).clone(), None
        per_row = q.scale[..., 0].repeat_interleave(rows, dim=-1)[..., :n]
        return None, pad(per_row, (0, padding)).contiguous(), None
    if plan.scale_kind == _SHARED:
        scale = q.scale
        if q.format.scale == "e8m0":
            scale = e8m0_values()[scale.long()]
        return scale.float().contiguous(), row_scale, None
    codes = q.scale if plan.scale_kind == _FLOAT32 else q.scale.view(torch.uint8)
    nan_rows = None
    if plan.scale_kind != _FLOAT32:
        is_nan = codes == 255 if plan.scale_kind == _E8M0 else (codes & 127) == 127
        nan_rows = pad(is_nan.any(-1), (0, padding))
    scale = pad(codes, (0, 0, 0, padding)).unflatten(-2, (panels, PANEL)).transpose(-1, -2)
    return scale.contiguous(), row_scale, nan_rows


def unpack(packed: PackedWeight) -> QuantTensor | Tensor:
    """What :func:`pack` was given, bit for bit."""
    verify(packed)
    plan = _served(packed.format)
    shape = tuple(packed.shape)
    experts, n, k, _ = _grid(shape)
    fmt = None
    if packed.format.startswith("dense:"):
        plain = torch.empty(shape, dtype=_DENSE[packed.format.removeprefix("dense:")])
    else:
        fmt = QuantFormat.from_string(packed.format)
        plain = torch.empty(fmt.data_shape(shape), dtype=fmt.data_dtype)
    _C.unpack_codes(
        plan.element, experts, n, k, plain.data_ptr(), packed.data.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if fmt is None:
        return plain
    return QuantTensor(plain, _unpack_scales(packed, plan, fmt, n), packed.global_scale, fmt, shape)


def _unpack_scales(packed: PackedWeight, plan: _Plan, fmt: QuantFormat, n: int) -> Tensor:
    if packed.scale is None:
        rows = fmt.block[0]
        if packed.row_scale is None:
            raise ValueError("unpack_weight: packed: expected scales, got None")
        last, step = (1, 1) if rows == -1 else (n, rows)
        return packed.row_scale[..., :last:step].unsqueeze(-1).contiguous()
    if plan.scale_kind == _SHARED:
        if fmt.scale == "e8m0":  # the exponent field is the code: 0 for 2^-127, 255 for NaN
            return (packed.scale.view(torch.int32) >> 23).to(torch.uint8)
        return packed.scale.to(fmt.scale_dtype)
    scale = packed.scale.transpose(-1, -2).flatten(-3, -2)[..., :n, :]
    return scale.contiguous().view(fmt.scale_dtype)


@lru_cache(maxsize=4096)
def _form(spec: str, shape: tuple[int, ...]) -> Any:
    """A _C.PackedMatrix without addresses."""
    plan = _served(spec)
    experts, n, k, panels = _grid(shape)
    shared = plan.scale_panels or max(panels, 1)
    return _C.PackedMatrix(
        plan.element, plan.scale_kind, experts, n, k, plan.block, shared, plan.unit
    )


@lru_cache(maxsize=4096)
def _buffers(spec: str, shape: tuple[int, ...]) -> tuple[tuple[str, torch.dtype, int, bool], ...]:
    """(field, dtype, elements, required) of a weight packed from this format and shape."""
    plan = _served(spec)
    experts, _, k, panels = _grid(shape)
    outputs, blocks = experts * panels * PANEL, -(-k // plan.block)
    dense = spec.startswith("dense:")
    if plan.scale_kind == _SHARED:
        scales = prod(QuantFormat.from_string(spec).scale_shape(shape))
    else:
        scales = outputs * blocks if plan.scale_kind != _NONE else 0
    scale_dtype = torch.uint8 if plan.scale_kind in (_E8M0, _E4M3) else torch.float32
    codes = experts * panels * -(-k // 4) * _C.group_bytes(plan.element)
    return (
        ("data", torch.uint8, codes, True),
        ("scale", scale_dtype, scales, plan.scale_kind != _NONE),
        ("row_scale", torch.float32, outputs, plan.scale_kind == _NONE and not dense),
        ("poison", torch.float32, outputs, False),
    )


def verify(packed: PackedWeight) -> None:
    """Refuse a weight that was edited or damaged: the kernels trust its addresses.

    Raises ValueError naming the field, what the format and shape need, and what it holds.
    """
    for name, dtype, count, required in _buffers(packed.format, tuple(packed.shape)):
        t = getattr(packed, name)
        if t is None and not required:
            continue
        # Row scales of a weight without outputs still hold one panel.
        if (
            t is None or t.dtype != dtype or t.device.type != "cpu" or not t.is_contiguous()
            or (t.numel() != count if name in ("data", "scale") else t.numel() < count)
        ):  # fmt: skip
            got = "None" if t is None else f"{t.dtype} {list(t.shape)} on {t.device}"
            raise ValueError(
                f"packed weight: {name}: expected {count} contiguous {dtype} on cpu for "
                f"{packed.format} {list(packed.shape)}, got {got}. Pack it again"
            )


def matrix(packed: PackedWeight) -> Any:
    """The weight as the kernels see it: addresses only, ``packed`` must outlive it."""
    verify(packed)
    return _form(packed.format, packed.shape).at(
        packed.data.data_ptr(), address(packed.scale), address(packed.row_scale),
        address(packed.poison),
    )  # fmt: skip


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x [..., K] @ weight.T + bias, one rounding to out_dtype."""
    n, k = weight.shape
    out = torch.empty(*x.shape[:-1], n, dtype=out_dtype)
    m = prod(x.shape[:-1])
    rows = x if x.ndim == 2 else x.reshape(m, k)
    if rows.stride(1) != 1 and k > 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    _C.quant_linear(
        matrix(weight), rows.data_ptr(), DTYPE[x.dtype], m, rows.stride(0), address(bias),
        out.data_ptr(), DTYPE[out_dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _why_not_pack(
    data: Tensor, scale: Tensor | None, global_scale: Tensor | None, spec: str, shape: list[int]
) -> str | None:
    return _not_here(data) or why_not_format(spec)


def _pack_weight(
    data: Tensor, scale: Tensor | None, global_scale: Tensor | None, spec: str, shape: list[int]
) -> PackedWeight:
    return pack(data if scale is None else quantized(data, scale, global_scale, spec, shape))


def _why_not_packed(*packed: Any) -> str | None:
    layout = packed[7]
    reason = _not_here(packed[0])
    if reason is not None:
        return reason
    return None if layout == LAYOUT else f"the weight was packed as {layout!r}, not {LAYOUT!r}"


def _unpack_weight(*packed: Any) -> QuantTensor | Tensor:
    return unpack(packed_weight(*packed))


def _why_not_linear(x: Tensor, *rest: Any) -> str | None:
    *packed, bias, _, out_dtype = rest
    return _not_here(x) or _why_not_packed(*packed) or _why_not_floats(x.dtype, bias, out_dtype)


def _quant_linear(x: Tensor, *rest: Any) -> Tensor:
    *packed, bias, activation, out_dtype = rest
    if activation:
        how = QuantFormat.from_string(activation) if ":" in activation else activation
        x = _reference.quantized_activations(x, how)
    return linear(x, packed_weight(*packed), bias, out_dtype)


def _why_not_scaled_mm(*args: Any) -> str | None:
    *operands, bias, out_dtype = args
    return (
        _not_here(operands[0])
        or why_not_format(operands[8])
        or _why_not_floats(torch.float32, bias, out_dtype)
    )


def _scaled_mm(*args: Any) -> Tensor:
    """b is packed for this one call: the codes are moved once, and decoded in registers or L1."""
    *operands, bias, out_dtype = args
    a, b = quantized(*operands[:5]), quantized(*operands[5:])
    return linear(dequantize(a, torch.float32), pack(b), bias, out_dtype)


def _not_here(t: Tensor) -> str | None:
    return None if t.device.type == "cpu" else f"tensors are on {t.device}"


def _why_not_floats(x: torch.dtype, bias: Tensor | None, out: torch.dtype) -> str | None:
    for name, dtype in (("x", x), ("bias", None if bias is None else bias.dtype), ("out", out)):
        if dtype not in (None, *_FLOATS):
            return f"{name} is {dtype}; sums are fp32"
    return None


registry.implement("pack_weight", "cpu", _pack_weight, _why_not_pack)
registry.implement("unpack_weight", "cpu", _unpack_weight, _why_not_packed)
registry.implement("quant_linear", "cpu", _quant_linear, _why_not_linear)
registry.implement("scaled_mm", "cpu", _scaled_mm, _why_not_scaled_mm)
