"""Routing in one launch: scores, groups, top-k and weights of a token's experts.

Problem   router_logits [T, E] -> topk_weights, topk_ids [T, k + shared]. Tiny work, so one launch
          and no scratch; every published routing function is a setting.

Plan      A program routes one token, whose whole row it holds in registers as a tile
          [groups, experts of a group], both padded to powers of two. A key of selection and its
          expert are packed in one int64 (see `pack_keys`): keys are then unique, the largest has
          the lowest index among equals, and padding lies below everything real. So each of the k
          steps is one max-reduction, whatever the scores. The weights are computed afterwards from
          the k logits alone, read again by id.

Rules     those of moesaic.reference.moe.fused_topk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.math import log1p

INDEX_BITS = tl.constexpr(16)
INDEX_MASK = tl.constexpr(0xFFFF)
#: Below every key of a real expert: padding, and what has been taken.
NEVER = tl.constexpr(-(1 << 62))
#: Added to the keys of experts whose group lost.
LOSING = tl.constexpr(-(1 << 50))
LARGEST = tl.constexpr(3.4028234663852886e38)

#: Most experts that a row may have: the index takes INDEX_BITS of a key, the row fits in registers.
MAX_EXPERTS = 4096


@triton.jit
def pack_keys(values, index):
    """int64 keys that order as fp32 ``values`` do, equal values by the lower ``index``.

    As a signed integer, a float's bits order positive floats rightly and negative ones backwards;
    flipping the latter's magnitude bits repairs that. -0 counts as +0.
    """
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << INDEX_BITS) | (index ^ INDEX_MASK)


@triton.jit
def unpack_index(key):
    """The index that was packed in a key."""
    return ((key & INDEX_MASK) ^ INDEX_MASK).to(tl.int32)


@triton.jit
def clean(logits):
    """fp32 logits without NaN (as -inf) and +inf (as the largest finite)."""
    x = logits.to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), LARGEST)


@triton.jit
def score(x, highest, total, SCORING: tl.constexpr):
    """f(x) of clean logits; ``highest`` and ``total`` are the softmax's maximum and sum."""
    if SCORING == "softmax":
        result = tl.exp(x - highest) / total
    elif SCORING == "sigmoid":
        result = 1.0 / (1.0 + tl.exp(-x))
    elif SCORING == "sqrtsoftplus":
        root = tl.sqrt(tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x))))
        result = tl.where(x < -40.0, tl.exp(x * 0.5), root)
    else:
        result = x
    return tl.where(x == float("-inf"), 0.0, result)


@triton.jit
def softmax_terms(x, axis: tl.constexpr):
    """The maximum of clean logits (0 if all are -inf) and the sum of exp(x - maximum), >= 1."""
    highest = tl.max(x, axis)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, tl.maximum(tl.sum(tl.exp(x - highest), axis), 1.0)


@triton.jit
def group_scores(keys, values, group, GROUP_SCORE: tl.constexpr):
    """One packed key a group [G]: by its best key, or by the sum of its two largest values.

    keys [G, P] are packed; values [G, P] are -inf where they do not count.
    """
    if GROUP_SCORE == "max":
        best = tl.max(keys, 1)
        # The index bits of the best key give way to those of the group.
        return ((best >> INDEX_BITS) << INDEX_BITS) | (group ^ INDEX_MASK)
    lanes = tl.arange(0, values.shape[1])[None, :]
    first = tl.max(values, 1)
    at = tl.min(tl.where(values == first[:, None], lanes, values.shape[1]), 1)
    second = tl.max(tl.where(lanes == at[:, None], float("-inf"), values), 1)
    total = first + tl.where(second == float("-inf"), 0.0, second)
    return pack_keys(total, group)


@triton.jit
def choose(keys, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Indices [BLOCK_K] of the TOP_K largest packed keys [N], largest first; 0 past TOP_K."""
    lane = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for i in range(TOP_K):
        best = tl.max(keys, 0)
        chosen = tl.where(lane == i, unpack_index(best), chosen)
        keys = tl.where(keys == best, NEVER, keys)
    return chosen


@triton.jit
def select_experts(
    x, e, g, real, bias, highest, total,
    SCORING: tl.constexpr, SOFTMAX_AFTER: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr, GROUP_SCORE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ids [BLOCK_K] of the chosen experts; x, e and real are [BLOCK_G, BLOCK_P]."""
    values = x
    if bias is not None or TOPK_GROUP < GROUPS:
        if not SOFTMAX_AFTER:
            values = score(x, highest, total, SCORING)
        if bias is not None:
            values = values + tl.load(bias + e, mask=real, other=0.0).to(tl.float32)
            values = tl.where(values == values, values, float("-inf"))
    values = tl.where(x == float("-inf"), float("-inf"), values)
    rank = values if bias is not None else x
    keys = tl.where(real, pack_keys(rank, e), NEVER)
    if TOPK_GROUP < GROUPS:
        values = tl.where(real, values, float("-inf"))
        per_group = group_scores(keys, values, g, GROUP_SCORE)
        per_group = tl.where(g < GROUPS, per_group, NEVER)
        lost = tl.full([BLOCK_G], 1, tl.int1)
        for _ in range(TOPK_GROUP):
            best = tl.max(per_group, 0)
            lost = lost & (per_group != best)
            per_group = tl.where(per_group == best, NEVER, per_group)
        keys = tl.where(lost[:, None] & real, keys + LOSING, keys)
    return choose(keys.reshape(BLOCK_G * BLOCK_P), TOP_K, BLOCK_K)


@triton.jit
def fused_topk_kernel(
    logits, bias, per_expert_scale, token_mask, given_ids, expert_map, weights_out, ids_out,
    stride_lt, stride_gt, experts, shared_weight, scaling, renorm_eps,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, SCORING: tl.constexpr, SOFTMAX_AFTER: tl.constexpr,
    RENORMALIZE: tl.constexpr, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr,
    GROUP_SCORE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    routed = slot < TOP_K
    row = logits + t * stride_lt

    # The row is needed to choose, and for the softmax over it.
    highest = 0.0
    total = 1.0
    if given_ids is None or (SCORING == "softmax" and not SOFTMAX_AFTER):
        per_group = experts // GROUPS
        g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
        real = (g < GROUPS)[:, None] & (p < per_group)[None, :]
        e = g[:, None] * per_group + p[None, :]
        x = clean(tl.load(row + e, mask=real, other=float("-inf")))
        if SCORING == "softmax" and not SOFTMAX_AFTER:
            highest, total = softmax_terms(x.reshape(BLOCK_G * BLOCK_P), 0)

    if given_ids is not None:
        ids = tl.load(given_ids + t * stride_gt + slot, mask=routed, other=-1).to(tl.int64)
        valid = (ids >= 0) & (ids < experts)
        ids = tl.where(valid, ids, 0).to(tl.int32)
    else:
        ids = select_experts(
            x, e, g, real, bias, highest, total, SCORING, SOFTMAX_AFTER, TOP_K, GROUPS, TOPK_GROUP,
            GROUP_SCORE, BLOCK_G, BLOCK_P, BLOCK_K,
        )  # fmt: skip
        valid = routed

    chosen = clean(tl.load(row + ids, mask=valid, other=float("-inf")))
    if SOFTMAX_AFTER:
        highest, total = softmax_terms(chosen, 0)
        weights = score(chosen, highest, total, "softmax")
    else:
        weights = score(chosen, highest, total, SCORING)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + renorm_eps)
    weights = weights * scaling
    if per_expert_scale is not None:
        scale = tl.load(per_expert_scale + ids, mask=valid, other=0.0).to(tl.float32)
        weights = tl.where(valid, weights * scale, 0.0)

    ids = tl.where(valid, ids, -1)
    if SHARED > 0:
        ids = tl.where(routed, ids, experts + slot - TOP_K)
        weights = tl.where(routed, weights, shared_weight)
    stored = slot < TOP_K + SHARED
    if expert_map is not None:
        mapped = tl.load(expert_map + ids, mask=stored & (ids >= 0), other=-1)
        ids = mapped.to(tl.int32)
    if token_mask is not None:
        ids = tl.where(tl.load(token_mask + t) != 0, ids, -1)
    weights = tl.where(ids < 0, 0.0, weights)
    at = t * (TOP_K + SHARED) + slot
    tl.store(weights_out + at, weights.to(weights_out.dtype.element_ty), mask=stored)
    tl.store(ids_out + at, ids, mask=stored)


def heuristic(lanes: int) -> int:
    """Warps for a row of ``lanes`` elements: one warp reduces without shared memory."""
    return max(1, min(8, lanes // 512))


def fused_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring_func: str,
    softmax_after_topk: bool = False,
    renormalize: bool = False,
    renorm_eps: float = 1e-20,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    per_expert_scale: Tensor | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    token_mask: Tensor | None = None,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """moesaic.reference.moe.fused_topk for fp32, fp16 and bf16 inputs and E <= MAX_EXPERTS."""
    tokens, experts = router_logits.shape
    width = top_k + num_fused_shared_experts
    device = router_logits.device
    weights = torch.empty(tokens, width, dtype=weights_dtype, device=device)
    ids = torch.empty(tokens, width, dtype=torch.int32, device=device)
    if weights.numel() == 0:
        return weights, ids

    def rows(t: Tensor) -> Tensor:
        return t if t.stride(-1) == 1 else t.contiguous()

    router_logits = rows(router_logits)
    topk_ids = None if topk_ids is None else rows(topk_ids)
    vectors = (e_score_correction_bias, per_expert_scale, token_mask, expert_map)
    bias, scale, mask, local = (None if v is None else v.contiguous() for v in vectors)
    block_g = triton.next_power_of_2(num_expert_group)
    block_p = triton.next_power_of_2(max(1, experts // num_expert_group))
    fused_topk_kernel[(tokens,)](
        router_logits, bias, scale,
        None if mask is None else mask.view(torch.uint8), topk_ids, local, weights, ids,
        router_logits.stride(0), 0 if topk_ids is None else topk_ids.stride(0), experts,
        float(shared_expert_weight), float(routed_scaling_factor), float(renorm_eps),
        TOP_K=top_k, SHARED=num_fused_shared_experts, SCORING=scoring_func,
        SOFTMAX_AFTER=softmax_after_topk, RENORMALIZE=renormalize, GROUPS=num_expert_group,
        TOPK_GROUP=topk_group, GROUP_SCORE=group_score, BLOCK_G=block_g, BLOCK_P=block_p,
        BLOCK_K=triton.next_power_of_2(width), enable_fp_fusion=True,
        num_warps=heuristic(block_g * block_p),
    )  # fmt: skip
    return weights, ids
