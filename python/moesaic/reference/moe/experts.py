"""The expert layer: gather, two matmuls around an activation, weighted sum; and routing first."""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped import Weight, activate, grouped_rows, weight_shape, work_dtype
from .routing import fused_topk
from .sorting import local_ids

__all__ = ["fused_experts", "fused_moe"]


def fused_experts(
    hidden_states: Tensor,
    w13: Weight,
    w2: Weight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    num_identity_experts: int = 0,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """The experts of a mixture, given the routing:

        out[t] = sum_j topk_weights[t, j] expert[topk_ids[t, j]](x[t]) + shared(x[t])
        expert[e](x) = w2[e] @ act(w13[e] @ x + w13_bias[e]) + w2_bias[e]

    Everything between input and output is fp32 (fp64 if any floating input is); the sum runs in
    slot order j = 0, 1, ...; one rounding at the end.

    hidden_states: x [T, H] floating.  w13: [E, 2 I, H], gate rows then up rows, or ``interleaved``
    g0 u0 g1 u1 ...; [E, I, H] for a non-gated activation.  w2: [E, H, I].  Weights are floating,
    QuantTensor or PackedWeight.  ``transposed``: floating weights held as [E, H, 2 I] and [E, I, H]
    (gpt-oss).
    w13_bias [E, 2 I] is added before the activation, w2_bias [E, H] before the router's weight.
    topk_weights: [T, k] floating; topk_ids: [T, k] int, duplicates allowed.
    activation, alpha, limit, interleaved: see moe_activation.
    apply_router_weight_on_input: (k = 1, Llama-4) the weight multiplies x, not the expert's output.
    expert_map: int [G], global to local id or -1; ids then count global experts.
    num_identity_experts: n ids after the last (global) expert mean x itself, adding w x (LongCat).
    shared_w13 [2 J, H], shared_w2 [H, J]: one floating MLP with the same activation that every
    token takes, with weight 1, or sigmoid(shared_gate . x) if shared_gate [1, H] is given (Qwen).
    A slot with any other id contributes exactly 0.  Returns [T, H] of x's dtype.  Differentiable in
    x, the router's weights and all floating weights.
    """
    tokens, top_k = topk_ids.shape
    experts = weight_shape(w13, transposed)[0]
    work = work_dtype(
        hidden_states, w13, w2, topk_weights, w13_bias, w2_bias, shared_w13, shared_w2
    )
    x = hidden_states.to(work)
    weights = topk_weights.to(work)

    def mlp(rows: Tensor, first: Weight, second: Weight, ids: Tensor, b1=None, b2=None, flip=False):
        h = activate(
            grouped_rows(rows, first, ids, b1, flip), activation, alpha, limit, interleaved
        )
        return grouped_rows(h, second, ids, b2, flip)

    ids = local_ids(topk_ids, experts, expert_map).flatten()
    end = experts if expert_map is None else expert_map.shape[0]
    identity = (topk_ids >= end) & (topk_ids < end + num_identity_experts)

    rows = x.repeat_interleave(top_k, dim=0)
    if apply_router_weight_on_input:
        rows = rows * torch.where(ids[:, None] >= 0, weights.flatten()[:, None], 0.0)
    y = mlp(rows, w13, w2, ids, w13_bias, w2_bias, transposed).unflatten(0, (tokens, top_k))
    ids = ids.view(tokens, top_k)
    out = y.new_zeros(tokens, y.shape[2])
    for j in range(top_k):
        w = weights[:, j, None]
        term = y[:, j] if apply_router_weight_on_input else w * y[:, j]
        out = out + torch.where(ids[:, j, None] >= 0, term, 0.0)
        if num_identity_experts:
            out = out + torch.where(identity[:, j, None], w * x, 0.0)
    if shared_w13 is not None and shared_w2 is not None:
        first = torch.zeros(tokens, dtype=torch.long, device=x.device)
        shared = mlp(x, shared_w13[None], shared_w2[None], first)
        if shared_gate is not None:
            shared = shared * torch.sigmoid(x @ shared_gate.to(work).T)
        out = out + shared
    return out.to(hidden_states.dtype)


def fused_moe(
    hidden_states: Tensor,
    w13: Weight,
    w2: Weight,
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
    activation: str = "silu",
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    num_identity_experts: int = 0,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """:func:`fused_topk` of router_logits [T, E], then :func:`fused_experts`; arguments as there.

    The logits are an argument of their own, so hidden_states need not be what the router saw: a
    layer in a latent space (Nemotron) passes the latent rows.  router_logits has a column for every
    global routed expert, then ``num_identity_experts`` columns; fused shared experts are the last
    experts of w13 and w2 (and of expert_map) and have no column.  They do not go together with
    identity experts.
    Returns [T, H] of hidden_states' dtype.
    """
    weights, ids = fused_topk(
        router_logits,
        top_k,
        scoring_func=scoring_func,
        softmax_after_topk=softmax_after_topk,
        renormalize=renormalize,
        renorm_eps=renorm_eps,
        routed_scaling_factor=routed_scaling_factor,
        e_score_correction_bias=e_score_correction_bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        group_score=group_score,
        per_expert_scale=per_expert_scale,
        num_fused_shared_experts=num_fused_shared_experts,
        shared_expert_weight=shared_expert_weight,
        token_mask=token_mask,
        topk_ids=topk_ids,
    )
    return fused_experts(
        hidden_states,
        w13,
        w2,
        weights,
        ids,
        activation=activation,
        alpha=alpha,
        limit=limit,
        interleaved=interleaved,
        transposed=transposed,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        num_identity_experts=num_identity_experts,
        shared_w13=shared_w13,
        shared_w2=shared_w2,
        shared_gate=shared_gate,
    )
