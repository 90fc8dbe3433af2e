"""Routing: which experts a token goes to, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fused_topk"]

_MAX = torch.finfo(torch.float32).max
_NEVER = -torch.inf


def fused_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
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
    weights_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts a token and weigh them, by any published routing function.

    1. Scores s = f(x) of the logits x [T, E], by ``scoring_func``:
       "softmax" over all E, "sigmoid", "sqrtsoftplus" = sqrt(log(1 + e^x)), "none" = x.
       ``softmax_after_topk`` (with "softmax" only): s = x until step 4.
    2. Selection keys: s + ``e_score_correction_bias`` if that is given, else x itself.  Every f is
       increasing, so x orders as s does, without the ties that rounding makes.
    3. Groups: experts are ``num_expert_group`` runs of E / num_expert_group; only the
       ``topk_group`` groups with the best score stay.  Group score: the sum of the two largest
       s + bias ("top2_sum", one if there is only one), or the largest key ("max").  Then the k
       largest keys are chosen, largest first; at equal keys, and equal group scores, the lower
       index.
    4. Weights w = s of the chosen (never with the bias).  ``softmax_after_topk``: softmax over the
       k chosen x.  ``renormalize``: w / (sum w + renorm_eps).  Then times ``routed_scaling_factor``
       and times ``per_expert_scale[id]``.
    5. ``num_fused_shared_experts``: as many slots more, ids E, E + 1, ..., weight
       ``shared_expert_weight`` (1 / factor where the caller scales the output instead).
    6. Slots of tokens with ``token_mask`` False, and slots that ``expert_map`` sends to -1, get id
       -1 and weight 0.

    NaN logits count as -inf and +inf as the largest fp32.  A logit of -inf has score 0 for every f,
    is chosen only when nothing else is left (also with a bias; a NaN bias does the same), and does
    not count in a group's sum.  Ids are always unique within a row.

    router_logits: [T, E] floating; computed in fp32 (fp64 if any floating input is fp64).
    e_score_correction_bias, per_expert_scale: [E].  token_mask: bool [T].
    topk_ids: [T, top_k] int, given instead of chosen (hash routing, replay): only weights are
        computed.  An id outside [0, E) becomes -1 with weight 0 and takes no part in step 4.
    expert_map: int [E + num_fused_shared_experts], global to local id or -1.
    weights_dtype: float32 if None (float64 for fp64 inputs).
    Returns topk_weights [T, top_k + num_fused_shared_experts] and topk_ids int32 of the same shape.
    Differentiable in the logits (through the chosen weights) and in per_expert_scale.
    """
    floats = (router_logits, e_score_correction_bias, per_expert_scale)
    wide = any(t is not None and t.dtype == torch.float64 for t in floats)
    work = torch.float64 if wide else torch.float32
    x = router_logits.to(work)
    x = torch.where(x.isnan(), _NEVER, x).clamp(max=_MAX)
    scores = x if softmax_after_topk else _scores(x, scoring_func)

    if topk_ids is None:
        bias = None if e_score_correction_bias is None else e_score_correction_bias.to(work)
        ids = _choose(
            x.detach(), scores.detach(), bias, top_k, num_expert_group, topk_group, group_score
        )
        valid = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids = topk_ids.long()
        valid = (ids >= 0) & (ids < x.shape[1])
        ids = torch.where(valid, ids, 0)

    if softmax_after_topk:
        weights = _softmax(torch.where(valid, x.gather(1, ids), _NEVER))
    else:
        weights = torch.where(valid, scores.gather(1, ids), 0.0)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + renorm_eps)
    weights = weights * routed_scaling_factor
    if per_expert_scale is not None:
        weights = torch.where(valid, weights * per_expert_scale.to(work)[ids], 0.0)

    tokens, experts = x.shape
    shared = torch.arange(experts, experts + num_fused_shared_experts, device=x.device)
    ids = torch.cat([torch.where(valid, ids, -1), shared.expand(tokens, -1)], dim=1)
    weights = torch.cat(
        [weights, weights.new_full((tokens, num_fused_shared_experts), shared_expert_weight)], dim=1
    )
    if expert_map is not None:
        ids = torch.where(ids < 0, -1, expert_map.long()[ids.clamp(min=0)])
    if token_mask is not None:
        ids = torch.where(token_mask[:, None], ids, -1)
    weights = torch.where(ids < 0, 0.0, weights)
    return weights.to(weights_dtype or work), ids.clamp(min=-1).to(torch.int32)


def _scores(x: Tensor, scoring_func: str) -> Tensor:
    if scoring_func == "softmax":
        return _softmax(x)
    if scoring_func == "sigmoid":
        return torch.sigmoid(x)
    if scoring_func == "sqrtsoftplus":
        # log(1 + e^x) is e^x to the last bit far below 0, where sqrt would have an infinite slope.
        root = torch.logaddexp(x.clamp(min=-40), torch.zeros_like(x)).sqrt()
        return torch.where(x < -40, torch.exp(x / 2), root)
    return torch.where(x == _NEVER, 0.0, x)


def _softmax(x: Tensor) -> Tensor:
    """Softmax of the last dimension; a row of -inf gives zeros."""
    if x.shape[-1] == 0:
        return x
    highest = x.detach().amax(-1, keepdim=True)
    e = torch.exp(x - torch.where(highest == _NEVER, 0.0, highest))
    return e / e.sum(-1, keepdim=True).clamp(min=1.0)  # the largest term is e^0 = 1


def _choose(
    x: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    top_k: int,
    groups: int,
    keep: int,
    group_score: str,
) -> Tensor:
    """Ids [T, top_k] of the largest keys within the best groups."""
    never = x == _NEVER
    biased = scores if bias is None else scores + bias
    keys = (x if bias is None else biased).masked_fill(never, _NEVER)
    keys = torch.where(keys.isnan(), _NEVER, keys)
    order = _descending(keys)
    if keep < groups:
        if group_score == "max":
            per_group = keys.unflatten(1, (groups, -1)).amax(2)
        else:
            per_group = _top2_sum(
                torch.where(keys == _NEVER, _NEVER, biased).unflatten(1, (groups, -1))
            )
        losing = torch.ones_like(per_group, dtype=torch.bool)
        losing.scatter_(1, _descending(per_group)[:, :keep], False)
        losing = losing.repeat_interleave(x.shape[1] // groups, dim=1)
        # A stable sort by "its group loses" keeps the order of the keys, even among keys of -inf.
        last = losing.gather(1, order).to(torch.int8)
        order = order.gather(1, torch.sort(last, dim=1, stable=True).indices)
    return order[:, :top_k]


def _descending(keys: Tensor) -> Tensor:
    """Indices that sort each row from large to small, equal keys by index."""
    return torch.sort(keys, dim=1, descending=True, stable=True).indices


def _top2_sum(values: Tensor) -> Tensor:
    """Sum of the two largest of the last dimension that are not -inf; -inf if all are."""
    best = values.topk(min(2, values.shape[-1]), dim=-1).values
    total = torch.where(best == _NEVER, 0.0, best).sum(-1)
    return torch.where((best == _NEVER).all(-1), _NEVER, total)
