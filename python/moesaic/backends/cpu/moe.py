"""Rows of the cpu backend: moe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import registry
from ...formats import PackedWeight, QuantTensor
from ...ops import _weights
from . import extension, matmul
from ._dtypes import DTYPE, address

_C: Any = extension

# The values of the enums in csrc/include/moesaic/moe.h.
_SCORING = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2, "none": 3}
_GROUP_SCORE = {"top2_sum": 0, "max": 1}
_ACTIVATION = {
    "silu": 0,
    "gelu_tanh": 1,
    "swigluoai": 2,
    "swiglustep": 3,
    "situ": 4,
    "relu2": 5,
    "silu_no_mul": 6,
}
_WIDTH = len(_weights.FIELDS)


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _is_fp64(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float64


_ONLY_REFERENCE = "float64 is computed by the reference only"


def _topk_supports(logits: Tensor, *args: Any) -> str | None:
    bias, scale, weights_dtype = args[6], args[10], args[-1]
    if weights_dtype == torch.float64 or any(map(_is_fp64, (logits, bias, scale))):
        return _ONLY_REFERENCE
    return None


def _fused_topk(
    logits: Tensor, top_k: int, scoring_func: str, softmax_after_topk: bool, renormalize: bool,
    renorm_eps: float, routed_scaling_factor: float, bias: Tensor | None, num_expert_group: int,
    topk_group: int, group_score: str, per_expert_scale: Tensor | None, num_shared: int,
    shared_weight: float, token_mask: Tensor | None, topk_ids: Tensor | None,
    expert_map: Tensor | None, weights_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k + num_shared)
    ids = torch.empty(tokens, top_k + num_shared, dtype=torch.int32)
    bias, per_expert_scale = _fp32(bias), _fp32(per_expert_scale)
    _C.fused_topk(
        logits.data_ptr(), DTYPE[logits.dtype], logits.stride(0), tokens, experts, top_k,
        _SCORING[scoring_func], softmax_after_topk, renormalize, renorm_eps, routed_scaling_factor,
        address(bias), num_expert_group, topk_group, _GROUP_SCORE[group_score],
        address(per_expert_scale), num_shared, shared_weight, address(token_mask),
        address(topk_ids),
        address(expert_map), weights.data_ptr(), ids.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weights.to(weights_dtype), ids


def _weight_supports(name: str, data: Tensor, *rest: Any) -> str | None:
    spec, layout = rest[4], rest[6]
    if layout == _weights.DENSE:
        spec = "dense:" + str(data.dtype).removeprefix("torch.")
    elif layout not in (_weights.QUANT, matmul.LAYOUT):
        return f"{name} is packed as {layout!r}, not {matmul.LAYOUT!r}"
    reason = matmul.why_not_format(spec)
    return None if reason is None else f"{name}: {reason}"


def _experts_supports(x: Tensor, *args: Any) -> str | None:
    topk_weights, _, activation, _, _, _, w13_bias, w2_bias, *_, shared_w13, _, _ = args[
        2 * _WIDTH :
    ]
    if any(map(_is_fp64, (x, topk_weights, w13_bias, w2_bias))):
        return _ONLY_REFERENCE
    if activation not in _ACTIVATION:
        return f"no kernel for the activation {activation!r}"
    if shared_w13 is not None:
        return "no kernel for separate shared experts; num_fused_shared_experts routes them"
    return _weight_supports("w13", *args[:_WIDTH]) or _weight_supports(
        "w2", *args[_WIDTH : 2 * _WIDTH]
    )


def _fused_experts(x: Tensor, *args: Any) -> Tensor:
    w13 = _weights.unflatten(*args[:_WIDTH])
    w2 = _weights.unflatten(*args[_WIDTH : 2 * _WIDTH])
    (
        topk_weights, ids, activation, alpha, limit, interleaved, w13_bias, w2_bias, on_input,
        expert_map, num_identity, _, _, _,
    ) = args[2 * _WIDTH :]  # fmt: skip
    if x.stride(1) != 1:
        x = x.contiguous()
    if not (isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight)):
        w13, w2, w13_bias, w2_bias, expert_map = _pack_used(
            w13, w2, w13_bias, w2_bias, ids, expert_map
        )
    topk_weights, w13_bias, w2_bias = _fp32(topk_weights), _fp32(w13_bias), _fp32(w2_bias)
    out = torch.empty(x.shape, dtype=x.dtype)
    _C.fused_experts(
        matmul.matrix(w13), matmul.matrix(w2), x.data_ptr(), DTYPE[x.dtype], x.stride(0),
        x.shape[0],
        ids.shape[1], address(topk_weights), ids.data_ptr(), address(expert_map),
        0 if expert_map is None else expert_map.shape[0], num_identity, address(w13_bias),
        address(w2_bias), _ACTIVATION[activation], 1.0 if alpha is None else alpha,
        float("inf") if limit is None else limit, interleaved, on_input, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _pack_used(
    w13: _weights.Weight, w2: _weights.Weight, w13_bias: Tensor | None, w2_bias: Tensor | None,
    ids: Tensor, expert_map: Tensor | None,
) -> tuple[PackedWeight, PackedWeight, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Plain weights, packed for this call: only the experts that ids name, renumbered by a new
    map."""
    experts = w13.shape[0]
    local = torch.arange(experts) if expert_map is None else expert_map.long()
    local = torch.where((local >= 0) & (local < experts), local, -1)
    named = ids[(ids >= 0) & (ids < local.shape[0])].long()
    used = local[named].unique()
    used = used[used >= 0]
    place = torch.full((experts + 1,), -1, dtype=torch.int32)  # the last place is that of -1
    place[used] = torch.arange(used.numel(), dtype=torch.int32)

    def bias_of(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias[used]

    return _pack(w13, used), _pack(w2, used), bias_of(w13_bias), bias_of(w2_bias), place[local]


def _pack(weight: _weights.Weight, used: Tensor) -> PackedWeight:
    if isinstance(weight, PackedWeight):
        weight = matmul.unpack(weight)
    if used.numel() < weight.shape[0]:
        weight = weight[used] if isinstance(weight, Tensor) else _some_experts(weight, used)
    return matmul.pack(weight)


def _some_experts(q: QuantTensor, used: Tensor) -> QuantTensor:
    def rows(t: Tensor) -> Tensor:  # indexing is not defined for every 8-bit dtype
        return t.view(torch.uint8)[used].view(t.dtype) if t.element_size() == 1 else t[used]

    scale = q.global_scale
    if scale is not None:
        scale = scale.expand(*q.shape[:2], 1)[used]
    return QuantTensor(rows(q.data), rows(q.scale), scale, q.format, (used.numel(), *q.shape[1:]))


registry.implement("fused_topk", "cpu", _fused_topk, _topk_supports)
registry.implement("fused_experts", "cpu", _fused_experts, _experts_supports)
