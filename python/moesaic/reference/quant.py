"""Definitions of the quant room in plain PyTorch.

Everything is computed in fp32 from the input converted to fp32 (so an fp64 input is rounded first,
and codes and scales do not depend on the input's dtype beyond its values). The steps, in order:

1. ``amax`` of a block is the largest magnitude of its elements, NaN left out, Inf counted as the
   largest finite fp32. Then ``amax = min(max(amax, eps), amax_ub)``.
2. The scale follows from ``amax`` by ``format.scale_rule``; a block with ``amax == 0`` has scale 1.
3. Each element is divided by its scale (an IEEE division; by ``fl(scale * global_scale)`` where
   there is a global scale), clamped to the largest finite value of the element type, and rounded.
4. NaN: an element type with a NaN code gets that code. In a type without one, the block's scale
   becomes NaN and all codes of the block 0, so that the whole block decodes to NaN.

``docs/formats.md`` publishes what this gives for zero blocks, NaN, Inf, overflow and padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..formats import ElementType, QuantFormat, QuantTensor, e8m0_values
from ._philox import philox_u32

_MAX_FP32 = torch.finfo(torch.float32).max
_MIN_NORMAL_FP32 = torch.finfo(torch.float32).tiny
_MAX_E4M3 = 448.0
#: Largest block scale that the global scale of a four-over-six format allows for: it leaves room
#: for a block to take the larger of its two scales (256 * 6 / 4 <= 448).
_MAX_E4M3_FOUR_OVER_SIX = 256.0


def quantize(
    x: Tensor,
    format: QuantFormat,
    *,
    scale: Tensor | None = None,
    global_scale: Tensor | str | None = None,
    eps: float = 0.0,
    amax_ub: float | None = None,
    seed: int | None = None,
) -> QuantTensor:
    """Quantize ``x`` [..., N, K] (floating; 1-D is taken as [1, K]) to ``format``.

    scale: static scales, given instead of computed: dtype ``format.scale_dtype`` (multipliers;
        uint8 is E8M0 codes), broadcastable to ``format.scale_shape(x.shape)``.
    global_scale: for formats with one: an fp32 multiplier [], [..., 1, 1] or [..., N, 1], or
        "tensor" (the default: one per matrix of the last two dimensions) or "row" to compute it as
        ``amax / (element max * 448)``, 256 in place of 448 with four-over-six.
    eps: lower bound of amax, as DeepSeek's 1e-4, also for zero blocks (which else have scale 1).
    amax_ub: upper bound of amax; elements beyond it saturate.
    seed: needed for ``rounding="stochastic"``. Element i (row-major) is rounded up in magnitude iff
        its distance from the lower code, as a fraction of the gap, is >= ``1 - (philox(seed, i) >>
        8) / 2**24``; so rounding is reproducible and unbiased to 2**-24.

    Scale rules, with m the element's max, e its exponent: ``exact`` is amax / m (at least 2**-126;
    E4M3 scales: amax / m / global_scale, clamped to [2**-9, 448] and rounded to nearest even).
    The others give 2**k with k clamped to [-127, 127]: ``floor`` k = floor(log2 amax) - e; ``ceil``
    k = ceil(log2 amax) - e; ``rceil`` the smallest k with amax <= m * 2**k; ``even`` floor after
    rounding amax half-up to the element's mantissa bits. In bits of the fp32 amax, exponent = (bits
    + addend) >> 23, with addend 0, 2**23 - 1, 2**23 - 1 - mantissa(m), 2**(22 - mantissa bits).

    Four-over-six encodes each block with amax mapped to 6 and to 4 and keeps the smaller sum of
    squared errors (in fp64); equal errors keep 6.
    """
    x = x.to(torch.float32)
    if x.ndim == 1:
        x = x[None]
    amax = _bounded(_block_amax(x, format), eps, amax_ub)
    gscale = None
    if format.global_scale:
        gscale = (
            global_scale
            if isinstance(global_scale, Tensor)
            else _global_scale(x, format, global_scale or "tensor", eps, amax_ub)
        )
    if scale is not None:
        grid = scale.expand(format.scale_shape(tuple(x.shape))).clone()
        codes = _encode_blocks(x, grid, gscale, format, seed)
    elif format.four_over_six:
        grid, codes = _four_over_six(x, amax, gscale, format, seed)
    else:
        grid = block_scale(amax, gscale, format, format.max)
        codes = _encode_blocks(x, grid, gscale, format, seed)
    if format.element_type.nan_code is None:
        poisoned = _split(x.isnan(), format).any(-1).any(-2)
        grid = torch.where(poisoned, _nan_scale(format, x.device), _raw(grid)).view(grid.dtype)
        codes = codes.masked_fill(_spread(poisoned, format, x.shape), 0)
    return QuantTensor(_pack(codes, format), grid, gscale, format, tuple(x.shape))


def dequantize(q: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of ``q``: ``((code value * scale) * global_scale)`` in fp32, rounded once to
    ``dtype``.

    Returns ``dtype`` of shape ``q.shape``. The arithmetic is fp64 when ``dtype`` is float64; the
    product is then exact.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = q.format.values(q.device)[_unpack(q.data, q.format, q.shape).long()].to(work)
    values = values * _spread(_scale_values(q.scale).to(work), q.format, q.shape)
    if q.global_scale is not None:
        values = values * q.global_scale.to(work)
    return values.to(dtype)


def fake_quantize(
    x: Tensor,
    format: QuantFormat,
    *,
    scale: Tensor | None = None,
    global_scale: Tensor | str | None = None,
    eps: float = 0.0,
    amax_ub: float | None = None,
    seed: int | None = None,
    clip_gradient: bool = False,
) -> Tensor:
    """``dequantize(quantize(x, format, ...), x.dtype)``, with the shape of ``x``.

    The gradient is straight-through: 1 everywhere, or with ``clip_gradient`` 0 where the element
    saturated (its magnitude exceeds the largest value its block can hold) and for NaN.
    """
    with torch.no_grad():
        q = quantize(
            x, format, scale=scale, global_scale=global_scale, eps=eps, amax_ub=amax_ub, seed=seed
        )
        mask = inside(x, q).reshape(x.shape) if clip_gradient else None
    return straight_through(x, dequantize(q, x.dtype).reshape(x.shape), mask)


def straight_through(x: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """``value``, with the gradient of ``x`` (where ``mask``, if given)."""
    return _StraightThrough.apply(x, value, mask)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value, mask):
        ctx.save_for_backward(mask)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return (grad if mask is None else grad * mask), None, None


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    format: QuantFormat,
    *,
    norm_eps: float = 1e-6,
    residual: Tensor | None = None,
    return_norm: bool = False,
    scale: Tensor | None = None,
    global_scale: Tensor | str | None = None,
    eps: float = 0.0,
    amax_ub: float | None = None,
    seed: int | None = None,
) -> Any:
    """Quantize ``rms_norm(x + residual) * weight``; ``x`` [..., N, K], ``weight`` [K].

    ``h = round(x + residual)`` (only with a residual), ``y = round(h * rsqrt(mean(h**2) + norm_eps)
    * weight)``, both in fp32 (fp64 for fp64 inputs) with one rounding to ``x.dtype``, as the
    unfused model has them; then ``quantize(y, format, ...)``.

    Returns the QuantTensor; with a residual and ``return_norm`` the tuple (q, h, y), with either of
    them (q, h) or (q, y). ``h`` and ``y`` have the shape and dtype of ``x``.
    """
    h, y = rms_norm(x, weight, residual, norm_eps)
    q = quantize(
        y, format, scale=scale, global_scale=global_scale, eps=eps, amax_ub=amax_ub, seed=seed
    )
    extra = ([] if residual is None else [h]) + ([y] if return_norm else [])
    return (q, *extra) if extra else q


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """(h, y) of :func:`rms_norm_quantize`."""
    work = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    h = x if residual is None else (x.to(work) + residual.to(work)).to(x.dtype)
    wide = h.to(work)
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps) * weight.to(work)
    return h, norm.to(x.dtype)


def silu_mul_quantize(
    x: Tensor,
    format: QuantFormat,
    *,
    activation: str = "silu",
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    scale: Tensor | None = None,
    global_scale: Tensor | str | None = None,
    eps: float = 0.0,
    amax_ub: float | None = None,
    seed: int | None = None,
) -> QuantTensor:
    """Quantize the gated activation of ``x`` [..., N, 2I]; the logical shape is [..., N, I].

    gate is the first half of the last dimension and up the second; with ``interleaved`` gate is the
    even and up the odd positions (gpt-oss). With a ``limit``, gate is clamped to at most ``limit``
    and up to [-limit, limit] first.

    * ``silu``: ``gate * sigmoid(alpha * gate) * up``, alpha 1 unless given, no limit unless given.
    * ``swigluoai``: ``gate * sigmoid(alpha * gate) * (up + 1)``, alpha 1.702, limit 7 unless given.

    fp32 (fp64 for fp64 x), rounded once to ``x.dtype`` as the unfused model has it, then
    ``quantize``.
    """
    y = gated(x, activation, alpha, limit, interleaved)
    return quantize(
        y, format, scale=scale, global_scale=global_scale, eps=eps, amax_ub=amax_ub, seed=seed
    )


def gated(
    x: Tensor, activation: str, alpha: float | None, limit: float | None, interleaved: bool
) -> Tensor:
    """The product that :func:`silu_mul_quantize` quantizes, rounded to ``x.dtype``."""
    oai = activation == "swigluoai"
    alpha = (1.702 if oai else 1.0) if alpha is None else alpha
    limit = 7.0 if limit is None and oai else limit
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    gate, up = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = gate * torch.sigmoid(alpha * gate) * (up + 1 if oai else up)
    return y.to(x.dtype)


def quantization_error(x: Tensor, q: QuantTensor) -> dict[str, float]:
    """How far ``q`` is from the tensor it was made from (same shape), as numbers for people.

    sqnr_db: 10 log10(sum x^2 / sum (x - q)^2), inf for a lossless result. rel_l2: sqrt of the
    inverse ratio. max_abs: largest |x - q|. cosine: of x and q. clipped: fraction of elements
    beyond the largest value of their block. flushed: fraction of non-zero elements that became 0.
    nan: fraction of elements that decode to NaN. Elements that are not finite on either side are
    left out of the first four. All in fp64; an empty tensor has error 0 and cosine 1.
    """
    return error_between(x, q, dequantize(q, torch.float64))


def error_between(x: Tensor, q: QuantTensor, got: Tensor) -> dict[str, float]:
    """:func:`quantization_error` with the fp64 values of ``q`` already known."""
    want = x.reshape(q.shape).double()
    count = max(want.numel(), 1)
    finite = want.isfinite() & got.isfinite()
    a, b = want[finite], got[finite]
    signal, noise = float(a.square().sum()), float((a - b).square().sum())
    norms = math.sqrt(signal) * float(b.norm())
    ratio = noise / signal if signal else math.inf if noise else 0.0
    return {
        "sqnr_db": math.inf if ratio == 0 else -10 * math.log10(ratio),
        "rel_l2": math.sqrt(ratio),
        "max_abs": float((a - b).abs().max()) if a.numel() else 0.0,
        "cosine": float(a @ b) / norms if norms else float(noise == 0),
        "clipped": float((~inside(x, q) & ~want.isnan()).sum()) / count,
        "flushed": float(((got == 0) & (want.abs() > 0)).sum()) / count,
        "nan": float(got.isnan().sum()) / count,
    }


def _bounded(amax: Tensor, eps: float, amax_ub: float | None) -> Tensor:
    return amax.clamp(min=eps, max=amax_ub)


def _split(x: Tensor, format: QuantFormat) -> Tensor:
    """[..., N, K] zero-padded to whole blocks: [..., rows, block rows, columns, block columns]."""
    shape = tuple(x.shape)
    *lead, rows, cols = format.scale_shape(shape)
    height, width = (
        max(n, 1) if b == -1 else b for n, b in zip(shape[-2:], format.block, strict=True)
    )
    padding = (0, cols * width - shape[-1], 0, rows * height - shape[-2])
    return torch.nn.functional.pad(x, padding).reshape(*lead, rows, height, cols, width)


def _block_amax(x: Tensor, format: QuantFormat) -> Tensor:
    """Largest magnitude per block, of the shape of the scales; NaN left out, Inf made finite."""
    return _split(x.abs().nan_to_num(nan=0.0, posinf=_MAX_FP32), format).amax(dim=(-3, -1))


def _spread(blocks: Tensor, format: QuantFormat, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """One value per block [..., rows, cols] to one per element [..., N, K]."""
    height, width = (n if b == -1 else b for n, b in zip(shape[-2:], format.block, strict=True))
    blocks = blocks.repeat_interleave(height, -2)[..., : shape[-2], :]
    return blocks.repeat_interleave(width, -1)[..., : shape[-1]]


def _scale_values(scale: Tensor) -> Tensor:
    """Stored scales as fp32 multipliers."""
    return e8m0_values(scale.device)[scale.long()] if scale.dtype == torch.uint8 else scale.float()


def _raw(scale: Tensor) -> Tensor:
    """E4M3 scales as bytes, which torch.where accepts everywhere; others as they are."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale


def _nan_scale(format: QuantFormat, device: torch.device) -> Tensor:
    """The NaN of the scale type: code 0xFF (E8M0), 0x7F (E4M3) or an fp32 NaN."""
    if format.scale == "fp32":
        return torch.tensor(math.nan, device=device)
    code = {"e8m0": 0xFF, "e4m3": 0x7F}[format.scale]
    return torch.tensor(code, dtype=torch.uint8, device=device)


def _global_scale(
    x: Tensor, format: QuantFormat, granularity: str, eps: float, amax_ub: float | None
) -> Tensor:
    whole = QuantFormat(format.element, (-1 if granularity == "tensor" else 1, -1), "fp32")
    return global_scale_of(_bounded(_block_amax(x, whole), eps, amax_ub), format)


def global_scale_of(amax: Tensor, format: QuantFormat) -> Tensor:
    """The global scale of a matrix or row with this (bounded) amax."""
    top = _MAX_E4M3_FOUR_OVER_SIX if format.four_over_six else _MAX_E4M3
    return torch.where(amax == 0, 1.0, (amax / (format.max * top)).clamp(min=_MIN_NORMAL_FP32))


def block_scale(
    amax: Tensor, global_scale: Tensor | None, format: QuantFormat, divisor: float
) -> Tensor:
    """Stored scales of blocks with this (bounded) amax, which maps to element value ``divisor``."""
    if format.scale_rule != "exact":
        code = torch.where(amax == 0, 127, _power_of_two_code(amax, format)).to(torch.uint8)
        return code if format.scale == "e8m0" else _scale_values(code)
    scale = amax / divisor
    if format.scale == "fp32":
        return torch.where(amax == 0, 1.0, scale.clamp(min=_MIN_NORMAL_FP32))
    if global_scale is not None:
        scale = scale / global_scale
    scale = torch.where(amax == 0, 1.0, scale.clamp(2.0**-9, _MAX_E4M3))
    return scale.to(torch.float8_e4m3fn)


def _power_of_two_code(amax: Tensor, format: QuantFormat) -> Tensor:
    """E8M0 code of 2**k by ``format.scale_rule``, from the bits of amax (see :func:`quantize`)."""
    fraction = (1 << 23) - 1
    max_mantissa = int(torch.tensor(format.max).view(torch.int32)) & fraction
    addend = {
        "floor": 0,
        "even": 1 << (22 - format.element_type.mantissa_bits),
        "rceil": fraction - max_mantissa,
        "ceil": fraction,
    }[format.scale_rule]
    return (((amax.view(torch.int32) + addend) >> 23) - format.emax).clamp(0, 254)


def _encode_blocks(
    x: Tensor, scale: Tensor, global_scale: Tensor | None, format: QuantFormat, seed: int | None
) -> Tensor:
    """Codes (uint8 bit patterns, [..., N, K]) of x under the given stored scales."""
    step = _spread(_scale_values(scale), format, x.shape)
    if global_scale is not None:
        step = step * global_scale
    quotient = x / step / format.code_unit
    element = format.element_type
    uniform = None
    if format.rounding == "stochastic":
        if seed is None:
            raise ValueError("quantize: seed: expected an int for stochastic rounding, got None")
        index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
        uniform = (philox_u32(seed, index) >> 8).float() * 2.0**-24
    code = _round_to_code(quotient.clamp(-element.max, element.max), element, uniform)
    if element.nan_code is not None:
        code = torch.where(quotient.isnan(), element.nan_code, code)
    return code.to(torch.uint8)


def _round_to_code(value: Tensor, element: ElementType, uniform: Tensor | None) -> Tensor:
    """Codes (int32 bit patterns) of values within the range of the type; 0 for NaN.

    A magnitude in [2**e, 2**(e+1)) is a whole number of steps of 2**(e - mantissa_bits), and codes
    of one sign are consecutive integers, so code = (e - min_exponent) * 2**mantissa_bits + steps,
    also for subnormals (e = min_exponent) and when rounding reaches the next power of two.
    """
    value = value.nan_to_num(nan=0.0)
    if not element.is_float:
        return _round(value, uniform).to(torch.int32) & 0xFF
    magnitude = value.abs()
    exponent = torch.frexp(magnitude.clamp(min=2.0**element.min_exponent)).exponent - 1
    steps = _round(torch.ldexp(magnitude, element.mantissa_bits - exponent), uniform)
    code = ((exponent - element.min_exponent) << element.mantissa_bits) + steps.to(torch.int32)
    negative = value.signbit()
    if element.name.endswith("fnuz"):  # no negative zero: that code is the NaN
        negative &= code != 0
    return code | negative.to(torch.int32) << (element.bits - 1)


def _round(value: Tensor, uniform: Tensor | None) -> Tensor:
    """To an integer: nearest even, or away from zero with the probability of the fraction."""
    if uniform is None:
        return value.round()
    down = value.trunc()
    up = (value - down).abs() >= 1 - uniform
    return down + torch.where(up, value.sign(), 0.0)


def _four_over_six(
    x: Tensor, amax: Tensor, global_scale: Tensor | None, format: QuantFormat, seed: int | None
) -> tuple[Tensor, Tensor]:
    six, four = (_candidate(x, amax, global_scale, format, seed, top) for top in (6.0, 4.0))
    better = four[2] < six[2]
    scale = torch.where(better, _raw(four[0]), _raw(six[0])).view(six[0].dtype)
    return scale, torch.where(_spread(better, format, x.shape), four[1], six[1])


def _candidate(
    x: Tensor, amax: Tensor, global_scale: Tensor | None, format: QuantFormat, seed: int | None,
    divisor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(scales, codes, sum of squared errors per block in fp64) with amax mapped to ``divisor``."""
    scale = block_scale(amax, global_scale, format, divisor)
    codes = _encode_blocks(x, scale, global_scale, format, seed)
    q = QuantTensor(_pack(codes, format), scale, global_scale, format, tuple(x.shape))
    error = (dequantize(q, torch.float64) - x).square().nan_to_num(nan=0.0)
    return scale, codes, _split(error, format).sum(dim=(-3, -1))


def inside(x: Tensor, q: QuantTensor) -> Tensor:
    """Whether each element of x is within what its block of ``q`` can hold; False for NaN.

    The limit is widened by 2**-22 for the rounding of an fp32 scale, which does not clip.
    """
    limit = _spread(_scale_values(q.scale).double(), q.format, q.shape) * q.format.max
    if q.global_scale is not None:
        limit = limit * q.global_scale
    return x.reshape(q.shape).abs().double() <= limit * (1 + 2.0**-22)


def _pack(codes: Tensor, format: QuantFormat) -> Tensor:
    """Codes (uint8, [..., N, K]) as ``QuantTensor.data``."""
    if format.values_per_byte == 2:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes.contiguous().view(format.data_dtype)


def _unpack(data: Tensor, format: QuantFormat, shape: tuple[int, ...]) -> Tensor:
    """``QuantTensor.data`` as codes (uint8, [..., N, K])."""
    data = data.view(torch.uint8)
    if format.values_per_byte == 2:
        data = torch.stack((data & 15, data >> 4), -1).flatten(-2)[..., : shape[-1]]
    return data
