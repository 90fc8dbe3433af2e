"""fused_topk on random routing functions, shapes and logits, under the guard."""

import pytest
import torch
from moesaic.kernels.moe.topk import fused_topk

from moesaic.reference import moe as reference
from moesaic.testing import interpreter
from moesaic.testing.interpreter import ORDERS, checked
from moesaic.testing.metrics import same_bits, within

from .shapes import Draw

interpreter.install()


def logits(draw, tokens, experts):
    """Ordinary rows, ties, NaN, infinities, nothing but -inf; in any dtype, strided or not."""
    x = draw.normal(tokens, experts) * draw.pick(0.1, 1.0, 10.0)
    place = torch.rand(tokens, experts, generator=draw.generator)
    kind = draw.pick("plain", "plain", "ties", "nan", "inf", "nothing")
    if kind == "ties":
        x = x.round()
    elif kind == "nan":
        x[place < 0.3] = torch.nan
    elif kind == "inf":
        x[place < 0.2], x[place > 0.8] = torch.inf, -torch.inf
    elif kind == "nothing":
        x[:] = -torch.inf
    return draw.strided(x.to(draw.pick(torch.float32, torch.bfloat16, torch.float16))), kind


def routing_function(draw, tokens, experts, groups, top_k):
    scoring = draw.pick("softmax", "sigmoid", "sqrtsoftplus", "none")
    shared = draw.pick(0, 0, 1, 2)
    ids = torch.randint(-2, experts + 2, (tokens, top_k), generator=draw.generator)
    local = torch.randint(-1, 5, (experts + shared,), generator=draw.generator)
    return {
        "scoring_func": scoring,
        "softmax_after_topk": scoring == "softmax" and draw.chance(2),
        "renormalize": draw.chance(2),
        "routed_scaling_factor": draw.pick(1.0, 2.5),
        "num_expert_group": groups[0],
        "topk_group": groups[1],
        "group_score": draw.pick("max", "top2_sum"),
        "e_score_correction_bias": draw.normal(experts) if draw.chance(2) else None,
        "per_expert_scale": draw.normal(experts) if draw.chance(3) else None,
        "num_fused_shared_experts": shared,
        "shared_expert_weight": 0.4,
        "token_mask": torch.rand(tokens, generator=draw.generator) < 0.5
        if draw.chance(3)
        else None,
        "topk_ids": draw.strided(ids).to(draw.pick(torch.int32, torch.int64))
        if draw.chance(4)
        else None,
        "expert_map": local.to(torch.int32) if draw.chance(4) else None,
    }


@pytest.mark.parametrize("seed", range(100))
def test_random_routing(seed):
    draw = Draw(seed)
    groups = draw.pick(1, 1, 1, 2, 4, 5, 8)
    size = draw.pick(1, 2, 3, 8, 20, 40)
    experts = groups * size if groups > 1 else draw.pick(1, 2, 7, 40, 60, 72, 128, 257, 513)
    keep = draw.integer(1, groups)
    top_k = draw.integer(1, min(keep * (experts // groups), 24))
    x, kind = logits(draw, draw.integer(1, 4), experts)
    kwargs = routing_function(draw, len(x), experts, (groups, keep), top_k)

    with checked(draw.pick(*ORDERS), seed=seed):
        weights, ids = fused_topk(x, top_k, **kwargs)
    ref, ref_ids = reference.fused_topk(x, top_k, **kwargs)
    same_bits(f"ids, seed {seed}", ids, ref_ids)
    # A sum of several times the largest fp32 overflows in fp32 only: no fp64 gold for that.
    overflows = kind == "inf" and kwargs["scoring_func"] == "none"
    gold = ref if overflows else reference.fused_topk(x.double(), top_k, **kwargs)[0]
    within(f"weights, seed {seed}", weights, ref, gold, terms=16)


def test_lowest_index_wins_every_tie():
    with checked():
        _, ids = fused_topk(torch.zeros(2, 300), 24, scoring_func="softmax")
    assert torch.equal(ids, torch.arange(24, dtype=torch.int32).expand(2, -1))


def test_negative_and_positive_zero_tie():
    x = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    with checked():
        _, ids = fused_topk(x, 3, scoring_func="none")
    assert ids.tolist() == [[0, 1, 2]]


def test_all_experts_of_4096_once_each():
    x = Draw(0).normal(1, 4096)
    with checked():
        _, ids = fused_topk(x, 64, scoring_func="softmax")
    want = torch.sort(x, descending=True, stable=True).indices[:, :64]
    assert torch.equal(ids.long(), want)


def test_sqrtsoftplus_keeps_its_digits_where_softplus_underflows():
    x = torch.tensor([[-100.0, -120.0, -200.0]])
    with checked():
        weights, _ = fused_topk(x, 2, scoring_func="sqrtsoftplus")
    torch.testing.assert_close(weights, torch.exp(x[:, :2] / 2), rtol=1e-5, atol=0.0)


def test_no_tokens():
    weights, ids = fused_topk(torch.empty(0, 8), 2, scoring_func="softmax")
    assert weights.shape == ids.shape == (0, 2)
