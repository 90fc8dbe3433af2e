"""The two things an expert is made of: a matmul grouped by expert, and an activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats import PackedWeight, QuantTensor
from ..matmul import unpack_weight
from ..quant import dequantize

__all__ = ["ACTIVATIONS", "Weight", "grouped_mm", "moe_activation"]

#: Expert weights [E, N, K]: floating, quantized, or packed by a backend.
Weight = Tensor | QuantTensor | PackedWeight


@dataclass(frozen=True)
class Activation:
    """``call(gate, up, alpha, limit)``; for a non-gated one ``up`` is None.

    The defaults are those of the models that introduced it; None where it has no such number (a
    limit of None: no clamp).
    """

    call: Callable[..., Tensor]
    gated: bool = True
    alpha: float | None = None
    limit: float | None = None


def _clamped(g: Tensor, u: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    return (g, u) if limit is None else (g.clamp(max=limit), u.clamp(-limit, limit))


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def call(g, u, alpha, limit):
        g, u = _clamped(g, u, limit)
        return act(g) * u

    return call


def _swigluoai(g, u, alpha, limit):
    g, u = _clamped(g, u, limit)
    return (u + 1) * (g * torch.sigmoid(alpha * g))


def _swiglustep(g, u, alpha, limit):
    _, u = _clamped(g, u, limit)
    act = F.silu(g)
    return (act if limit is None else act.clamp(max=limit)) * u


def _situ(g, u, alpha, limit):
    return alpha * torch.tanh(g / alpha) * torch.sigmoid(g) * (limit * torch.tanh(u / limit))


ACTIVATIONS = {
    "silu": Activation(_gated(F.silu)),
    "gelu": Activation(_gated(F.gelu)),
    "gelu_tanh": Activation(_gated(lambda g: F.gelu(g, approximate="tanh"))),
    "swigluoai": Activation(_swigluoai, alpha=1.702, limit=7.0),
    "swiglustep": Activation(_swiglustep, limit=7.0),
    "situ": Activation(_situ, alpha=4.0, limit=25.0),
    "relu2": Activation(lambda x, *_: F.relu(x).square(), gated=False),
    "silu_no_mul": Activation(lambda x, *_: F.silu(x), gated=False),
    "gelu_no_mul": Activation(lambda x, *_: F.gelu(x), gated=False),
}


def moe_activation(
    x: Tensor,
    activation: str = "silu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """The activation between the two matmuls of an expert.

    x: [..., 2 I] holding gate g and up u, concatenated (g then u) or ``interleaved`` (g0 u0 g1
    u1 ...); [..., I] for the non-gated.  Computed in fp32 (fp64 for fp64).  Returns [..., I] of x's
    dtype.

      "silu"         silu(min(g, limit)) clamp(u, -limit, limit); no limit (DeepSeek-V4: 10)
      "gelu"         the same with gelu by erf
      "gelu_tanh"    the same with gelu by tanh
      "swigluoai"    (u + 1) g sigmoid(alpha g), g and u clamped likewise; alpha 1.702, limit 7
                     (gpt-oss)
      "swiglustep"   min(silu(g), limit) clamp(u, -limit, limit); limit 7 (Step-3.5)
      "situ"         alpha tanh(g / alpha) sigmoid(g) limit tanh(u / limit); alpha 4, limit 25
                     (Kimi K3)
      "relu2"        not gated: max(x, 0)^2 (Nemotron)
      "silu_no_mul", "gelu_no_mul"   not gated: silu(x), gelu(x) by erf

    alpha and limit replace the defaults; limit = inf switches a clamp off.  Differentiable.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return activate(x.to(work), activation, alpha, limit, interleaved).to(x.dtype)


def activate(
    x: Tensor, activation: str, alpha: float | None, limit: float | None, interleaved: bool
) -> Tensor:
    """:func:`moe_activation` in the dtype of x."""
    act = ACTIVATIONS[activation]
    alpha = act.alpha if alpha is None else alpha
    limit = act.limit if limit is None else limit
    if not act.gated:
        return act.call(x, None, alpha, limit)
    if interleaved:
        return act.call(x[..., ::2], x[..., 1::2], alpha, limit)
    return act.call(*x.chunk(2, dim=-1), alpha, limit)


def weight_shape(weight: Weight, transposed: bool = False) -> tuple[int, ...]:
    """The logical shape [..., N, K] of a weight; ``transposed`` ones are held as [..., K, N]."""
    shape = tuple(weight.shape)
    return (*shape[:-2], shape[-1], shape[-2]) if transposed else shape


def expert_weight(
    weight: Tensor | QuantTensor, expert: int, transposed: bool, dtype: torch.dtype
) -> Tensor:
    """Weight of one expert, decoded exactly, as [N, K] of ``dtype``."""
    if isinstance(weight, QuantTensor):
        scale = weight.global_scale
        if scale is not None:
            scale = scale.expand(*weight.shape[:2], 1)[expert]
        one = (weight.data[expert], weight.scale[expert], scale, weight.format, weight.shape[1:])
        values = dequantize(QuantTensor(*one), dtype)
    else:
        values = weight[expert].to(dtype)
    return values.transpose(-1, -2) if transposed else values


def work_dtype(*values: object) -> torch.dtype:
    """fp64 if any tensor is, else fp32."""
    wide = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in values)
    return torch.float64 if wide else torch.float32


def grouped_rows(
    a: Tensor, weight: Weight, experts: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """grouped_mm with ``experts`` int64 [S], -1 for rows of zeros, in a's dtype."""
    if isinstance(weight, PackedWeight):
        weight = unpack_weight(weight)
    out = a.new_zeros(a.shape[0], weight_shape(weight, transposed)[1])
    for expert in experts[experts >= 0].unique().tolist():
        rows = (experts == expert).nonzero().squeeze(1)
        y = a[rows] @ expert_weight(weight, expert, transposed, a.dtype).T
        if bias is not None:
            y = y + bias[expert].to(a.dtype)
        out = out.index_copy(0, rows, y)
    return out


def grouped_mm(
    a: Tensor,
    weight: Weight,
    offs: Tensor | None = None,
    *,
    expert_ids: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply rows by the weight of their expert e: out[i] = weight[e] @ a[i] + bias[e].

    a: [S, K] floating.  weight: [E, N, K] floating, QuantTensor or PackedWeight; ``transposed``: a
    floating weight held as [E, K, N].  bias: [E, N].  The expert of row i is, with exactly one of
    the two given, the first e with i < offs[e] (offs: int [E], the running ends that moe_sort
    gives), or expert_ids[i] (int [S]).  Rows past offs[-1] and rows with an id outside [0, E) are
    exactly 0.
    Summed in fp32, rounded once to out_dtype (default: a's dtype).  Returns [S, N].  Differentiable
    in a, floating weights and bias.
    """
    experts = weight_shape(weight)[0]
    work = work_dtype(a, weight, bias)
    if offs is None:
        ids = cast(Tensor, expert_ids).long()
    else:
        places = torch.arange(a.shape[0], device=a.device)
        ids = (places[:, None] >= offs.long()).long().cumprod(1).sum(1)
    ids = torch.where((ids >= 0) & (ids < experts), ids, -1)
    return grouped_rows(a.to(work), weight, ids, bias, transposed).to(out_dtype or a.dtype)
