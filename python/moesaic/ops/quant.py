"""Doors of the quant room: quantize, dequantize, and producers that end in a quantized tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..formats import QuantFormat, QuantTensor
from ..reference import quant as _reference
from . import _check

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: The tail that every quantizing schema shares: how the values become codes.
_RULES = (
    "str format, Tensor? scale, Tensor? global_scale, bool row_global_scale, float eps, "
    "float? amax_ub, int? seed"
)
_CODES = "Tensor data, Tensor scale, Tensor global_scale"


def _fake_codes(x: Tensor, shape: Sequence[int], rules: tuple[Any, ...]) -> tuple[Tensor, ...]:
    spec, _, global_scale, by_row, *_ = rules
    format = QuantFormat.from_string(spec)
    shape = tuple(shape) if len(shape) > 1 else (1, *shape)
    lead, rows = shape[:-2], shape[-2] if by_row else 1
    top = (*lead, rows, 1) if format.global_scale and global_scale is None else (0,)
    return (
        x.new_empty(format.data_shape(shape), dtype=format.data_dtype),
        x.new_empty(format.scale_shape(shape), dtype=format.scale_dtype),
        x.new_empty(top, dtype=torch.float32),
    )


def _fake_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    norm_eps: float,
    return_norm: bool,
    *rules: Any,
) -> tuple[Tensor, ...]:
    h = x.new_empty((0,) if residual is None else x.shape)
    y = x.new_empty(x.shape if return_norm else (0,))
    return (*_fake_codes(x, x.shape, rules), h, y)


def _fake_silu_mul(
    x: Tensor,
    activation: str,
    alpha: float | None,
    limit: float | None,
    interleaved: bool,
    *rules: Any,
) -> tuple[Tensor, ...]:
    return _fake_codes(x, (*x.shape[:-1], x.shape[-1] // 2), rules)


# Absent outputs (a global scale that the format has not or that the caller gave) are empty tensors
# [0].
registry.define(
    f"quantize(Tensor x, {_RULES}) -> ({_CODES})",
    room="quant",
    fake=lambda x, *rules: _fake_codes(x, x.shape, rules),
)
registry.define(
    "dequantize(Tensor data, Tensor scale, Tensor? global_scale, str format, SymInt[] shape, "
    "ScalarType dtype) -> Tensor",
    room="quant",
    fake=lambda data, scale, global_scale, format, shape, dtype: data.new_empty(shape, dtype=dtype),
)
registry.define(
    "rms_norm_quantize(Tensor x, Tensor weight, Tensor? residual, float norm_eps, "
    f"bool return_norm, {_RULES}) -> ({_CODES}, Tensor hidden, Tensor norm)",
    room="quant",
    fake=_fake_rms_norm,
)
registry.define(
    "silu_mul_quantize(Tensor x, str activation, float? alpha, float? limit, bool interleaved, "
    f"{_RULES}) -> ({_CODES})",
    room="quant",
    fake=_fake_silu_mul,
)


def quantize(
    x: Tensor,
    format: QuantFormat,
    *,
    scale: Tensor | None = None,
    global_scale: Tensor | str | None = None,
    eps: float = 0.0,
    amax_ub: float | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> QuantTensor:
    """Quantize ``x`` to ``format``.

    x: [..., N, K] of float32, bfloat16, float16 or float64 (rounded to float32 first); 1-D is one
    row.
    scale: static scales instead of computed ones: ``format.scale_dtype``, broadcastable to
        ``format.scale_shape(x.shape)``; multipliers (uint8: E8M0 codes).
    global_scale: for formats that have one: an fp32 multiplier [], [..., 1, 1] or [..., N, 1], or
        "tensor" (default: one per matrix of the last two dimensions) or "row" to compute it.
    eps, amax_ub: bounds of each block's largest magnitude; DeepSeek's kernels use eps=1e-4.
    seed: an int >= 0, needed for formats with stochastic rounding; the same seed gives the same
        codes.

    Returns a :class:`QuantTensor`; codes and scales are the same on every backend, bit for bit.
    What zero blocks, NaN, Inf, overflow and padding give is published in docs/formats.md, the
    arithmetic in ``moesaic.reference.quant.quantize``. Not differentiable; see
    :func:`fake_quantize`.

    Raises ValueError or TypeError for arguments that do not fit together.
    """
    op = "quantize"
    _check.tensor(op, "x", x, dtypes=FLOATING)
    if x.ndim == 0:
        _check.fail(op, "x", "at least 1 dimension", "a 0-dimensional tensor")
    rules = _rules(op, x, tuple(x.shape), format, scale, global_scale, eps, amax_ub, seed)
    parts = registry.call(op, x.detach(), *rules, backend=backend)
    return _quant_tensor(parts, rules, format, tuple(x.shape))


def dequantize(
    q: QuantTensor, dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> Tensor:
    """The values of ``q`` in ``dtype`` (float32, bfloat16, float16 or float64), of shape
    ``q.shape``.

    Each is (code value * scale) * global_scale in fp32, rounded once to ``dtype``; exact for
    float64.
    """
    if dtype not in FLOATING:
        _check.fail("dequantize", "dtype", _check.names(FLOATING), dtype, kind=TypeError)
    return registry.call("dequantize", *flat("dequantize", "q", q), dtype, backend=backend)


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
    backend: str | None = None,
) -> Tensor:
    """``dequantize(quantize(x, format, ...), x.dtype)`` with the shape of ``x`` and a gradient.

    The gradient is straight-through: that of ``x``, or with ``clip_gradient`` 0 where the element
    saturated and for NaN. Arguments and errors as for :func:`quantize`.
    """
    _check.flag("fake_quantize", "clip_gradient", clip_gradient)
    q = quantize(
        x,
        format,
        scale=scale,
        global_scale=global_scale,
        eps=eps,
        amax_ub=amax_ub,
        seed=seed,
        backend=backend,
    )
    value = dequantize(q, x.dtype, backend=backend).reshape(x.shape)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return value
    inside = _reference.inside(x.detach(), q).reshape(x.shape) if clip_gradient else None
    return _reference.straight_through(x, value, inside)


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
    backend: str | None = None,
) -> Any:
    """Quantize ``rms_norm(x + residual) * weight``.

    x: [..., N, K] or [K]; weight: [K], floating; residual: None, or of the shape and dtype of x.
    Sum and norm are rounded to the dtype of x, as the unfused model has them; see the definition
    for the formula. The other arguments are those of :func:`quantize`.

    Returns the QuantTensor ``q``; with a residual (q, x + residual), with ``return_norm`` (q,
    norm), with both (q, x + residual, norm).
    """
    op = "rms_norm_quantize"
    _check.tensor(op, "x", x, dtypes=FLOATING)
    if x.ndim == 0:
        _check.fail(op, "x", "at least 1 dimension", "a 0-dimensional tensor")
    _check.tensor(op, "weight", weight, shape=x.shape[-1:], dtypes=FLOATING, like=x)
    _check.optional_tensor(op, "residual", residual, shape=x.shape, dtypes=(x.dtype,), like=x)
    norm_eps = _check.number(op, "norm_eps", norm_eps)
    _check.flag(op, "return_norm", return_norm)
    rules = _rules(op, x, tuple(x.shape), format, scale, global_scale, eps, amax_ub, seed)
    *parts, hidden, norm = registry.call(
        op, x, weight, residual, norm_eps, return_norm, *rules, backend=backend
    )
    q = _quant_tensor(parts, rules, format, tuple(x.shape))
    extra = (() if residual is None else (hidden,)) + ((norm,) if return_norm else ())
    return (q, *extra) if extra else q


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
    backend: str | None = None,
) -> QuantTensor:
    """Quantize the gated activation of ``x`` [..., N, 2I] to a QuantTensor of shape [..., N, I].

    activation: "silu", ``gate * sigmoid(alpha * gate) * up`` with alpha 1 unless given, or
        "swigluoai" (gpt-oss), ``gate * sigmoid(alpha * gate) * (up + 1)`` with alpha 1.702 and
        limit 7 unless given.
    limit: a positive number; gate is clamped to at most it and up to plus or minus it. None: not.
    interleaved: gate and up are the even and odd positions instead of the two halves.

    The product is rounded to the dtype of x before it is quantized, as the unfused model has it.
    The other arguments are those of :func:`quantize`.
    """
    op = "silu_mul_quantize"
    _check.tensor(op, "x", x, dtypes=FLOATING)
    if x.ndim == 0 or x.shape[-1] % 2:
        _check.fail(op, "x", "an even last dimension (gate and up)", _check.describe(x))
    _check.choice(op, "activation", activation, ("silu", "swigluoai"))
    alpha = None if alpha is None else _check.number(op, "alpha", alpha)
    if limit is not None and _check.number(op, "limit", limit) <= 0:
        _check.fail(op, "limit", "a positive number or None", limit)
    _check.flag(op, "interleaved", interleaved)
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    rules = _rules(op, x, shape, format, scale, global_scale, eps, amax_ub, seed)
    parts = registry.call(op, x, activation, alpha, limit, interleaved, *rules, backend=backend)
    return _quant_tensor(parts, rules, format, shape)


def quantization_error(
    x: Tensor, q: QuantTensor, *, backend: str | None = None
) -> dict[str, float]:
    """How far ``q`` is from the tensor ``x`` it was made from (as many elements, any floating
    dtype).

    Returns ``sqnr_db``, ``rel_l2``, ``max_abs``, ``cosine`` (over elements finite on both sides)
    and the fractions ``clipped``, ``flushed`` (to zero) and ``nan``; see the definition. For people
    and
    sweeps: it synchronises with the device.
    """
    op = "quantization_error"
    _check.tensor(op, "x", x, dtypes=FLOATING)
    flat(op, "q", q)
    if tuple(x.shape) != tuple(q.shape) and (1, *x.shape) != tuple(q.shape):
        _check.fail(op, "x", f"the shape of q, {list(q.shape)}", _check.describe(x))
    return _reference.error_between(x, q, dequantize(q, torch.float64, backend=backend))


def flat(
    op: str, argument: str, q: QuantTensor, *, like: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, str, tuple[int, ...]]:
    """A QuantTensor, checked, as the arguments that cross a schema: data, scale, global_scale,
    format, shape.

    Storage types that mean the same are taken alike: float4_e2m1fn_x2 as uint8, float8_e8m0fnu
    scales as uint8, uint8 codes and scales as the float8 type of the format.
    """
    if not isinstance(q, QuantTensor):
        _check.fail(
            op, argument, "a QuantTensor", type(q).__name__, kind=TypeError,
            remedy="moesaic.quantize makes one",
        )  # fmt: skip
    format, shape = q.format, tuple(q.shape)
    if len(shape) < 2:
        _check.fail(op, f"{argument}.shape", "at least 2 dimensions", list(shape))
    data = _stored(op, f"{argument}.data", q.data, format.data_dtype)
    _check.tensor(op, f"{argument}.data", data, shape=format.data_shape(shape), like=like)
    scale = _stored(op, f"{argument}.scale", q.scale, format.scale_dtype)
    _check.tensor(op, f"{argument}.scale", scale, shape=format.scale_shape(shape), like=data)
    if (q.global_scale is None) == format.global_scale:
        want = "a tensor (the format has one)" if format.global_scale else "None"
        _check.fail(op, f"{argument}.global_scale", want, type(q.global_scale).__name__)
    if q.global_scale is not None:
        _global(op, f"{argument}.global_scale", q.global_scale, shape, data)
    return data, scale, q.global_scale, str(format), shape


def _stored(op: str, argument: str, value: Any, dtype: torch.dtype) -> Tensor:
    """``value`` seen as ``dtype``, if it holds the same codes."""
    _check.tensor(op, argument, value)
    alike = {
        torch.uint8: ("float4_e2m1fn_x2", "float8_e8m0fnu"),
        torch.float8_e4m3fn: ("uint8",),
        torch.float8_e5m2: ("uint8",),
        torch.float8_e4m3fnuz: ("uint8",),
        torch.float8_e5m2fnuz: ("uint8",),
    }.get(dtype, ())
    if str(value.dtype).removeprefix("torch.") in alike:
        value = value.view(dtype)
    return _check.tensor(op, argument, value, dtypes=(dtype,))


def _expandable(have: Sequence[int], want: Sequence[int]) -> bool:
    """Whether a tensor of shape ``have`` broadcasts to ``want``."""
    pairs = zip(reversed(have), reversed(want), strict=False)
    return len(have) <= len(want) and all(h in (1, w) for h, w in pairs)


def _global(op: str, argument: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check.tensor(op, argument, value, dtypes=(torch.float32,), like=like)
    if not _expandable(value.shape, (*shape[:-1], 1)):
        _check.fail(
            op, argument, f"a shape that broadcasts to {[*shape[:-1], 1]}", _check.describe(value)
        )


def _rules(
    op: str, x: Tensor, shape: tuple[int, ...], format: QuantFormat, scale: Tensor | None,
    global_scale: Tensor | str | None, eps: float, amax_ub: float | None, seed: int | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments that say how values become codes, checked, as the schemas take them."""
    if not isinstance(format, QuantFormat):
        _check.fail(
            op, "format", "a QuantFormat", type(format).__name__, kind=TypeError,
            remedy="Presets are in moesaic.formats, for example moesaic.formats.MXFP4",
        )  # fmt: skip
    shape = shape if len(shape) > 1 else (1, *shape)
    if scale is not None:
        scale = _stored(op, "scale", scale, format.scale_dtype)
        grid = format.scale_shape(shape)
        _check.tensor(op, "scale", scale, like=x)
        if not _expandable(scale.shape, grid):
            _check.fail(
                op, "scale", f"a shape that broadcasts to {list(grid)}", _check.describe(scale)
            )
    by_row = global_scale == "row" if isinstance(global_scale, str) else False
    if global_scale is not None and not format.global_scale:
        _check.fail(op, "global_scale", f"None for {format}", _describe(global_scale))
    if isinstance(global_scale, str):
        _check.choice(op, "global_scale", global_scale, ("tensor", "row"))
        global_scale = None
    elif global_scale is not None:
        _global(op, "global_scale", global_scale, shape, x)
        by_row = global_scale.ndim > 1 and global_scale.shape[-2] != 1
    if by_row and format.block[0] != 1:
        _check.fail(
            op,
            "global_scale",
            f"one per matrix for blocks of {format.block[0]} rows",
            "one per row",
        )
    by_row = by_row and global_scale is None
    eps = _check.number(op, "eps", eps)
    if not eps >= 0:
        _check.fail(op, "eps", "a number >= 0", eps)
    if amax_ub is not None and not _check.number(op, "amax_ub", amax_ub) > 0:
        _check.fail(op, "amax_ub", "a positive number or None", amax_ub)
    if format.rounding == "stochastic":
        if seed is None:
            _check.fail(op, "seed", "an int for stochastic rounding", None)
        _check.integer(op, "seed", seed, 0, 2**63 - 1)
    return str(format), scale, global_scale, by_row, eps, amax_ub, seed


def _describe(value: Any) -> str:
    return _check.describe(value) if isinstance(value, Tensor) else repr(value)


def _quant_tensor(
    parts: Sequence[Tensor], rules: tuple[Any, ...], format: QuantFormat, shape: tuple[int, ...]
) -> QuantTensor:
    data, scale, computed = parts
    given = rules[2]
    top = None if not format.global_scale else computed if given is None else given
    return QuantTensor(data, scale, top, format, shape if len(shape) > 1 else (1, *shape))
