"""fused_topk by hand: ties, NaN, groups, bias, masks, maps; every implementation of this
machine."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

import moesaic
from moesaic import registry
from moesaic.reference import moe as reference

INF, NAN = float("inf"), float("nan")


@pytest.fixture(
    params=[
        b for b in ("reference", "cpu") if b in registry.implementations("fused_topk")["fused_topk"]
    ]
)
def fused_topk(request):
    return lambda *args, **kwargs: moesaic.fused_topk(*args, **kwargs, backend=request.param)


def ids_of(result):
    return result[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax_against_torch(fused_topk, dtype):
    x = torch.randn(50, 37).to(dtype)
    want, ids = x.float().softmax(1).topk(6)  # no ties among these scores of fp32 ...
    if dtype == torch.float32:
        weights, got = fused_topk(x, 6)
        assert torch.equal(got, ids.int())
        assert_close(weights, want)
    weights, got = fused_topk(x, 6, renormalize=True)
    assert_close(weights, want / want.sum(1, keepdim=True))  # ... and equal weights where there are
    assert_close(fused_topk(x, 6, softmax_after_topk=True)[0], weights)


def test_constant_logits_choose_the_lowest_indices(fused_topk):
    for value in (0.0, -3.0, INF, -INF, NAN):
        x = torch.full((3, 40), value)
        assert ids_of(fused_topk(x, 5)) == [[0, 1, 2, 3, 4]] * 3


def test_ties_fall_to_the_lower_index(fused_topk):
    x = torch.tensor([[1.0, 5.0, 2.0, 5.0, 5.0, 2.0, -0.0, 0.0]])
    assert ids_of(fused_topk(x, 8)) == [[1, 3, 4, 2, 5, 0, 6, 7]]


def test_nan_and_infinities(fused_topk):
    x = torch.tensor([[NAN, 1.0, -INF, 2.0, NAN], [INF, 0.0, INF, NAN, 1.0], [NAN] * 5])
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus", "none"):
        weights, ids = fused_topk(x, 4, scoring_func=scoring)
        assert ids.tolist() == [[3, 1, 0, 2], [0, 2, 4, 1], [0, 1, 2, 3]]
        assert not weights.isnan().any()
        assert weights[0, 2:].tolist() == [0.0, 0.0]
        assert weights[2].tolist() == [0.0] * 4
    weights, _ = fused_topk(x, 4, renormalize=True)
    assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert weights[1].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_no_finite_logit_is_lost_to_large_negative_scores(fused_topk):
    """A maximum search that starts at -1 or -10000 would miss these."""
    x = torch.randn(4, 12)
    bias = torch.full((12,), -1e6)
    bias[7] = -0.5e6
    _, ids = fused_topk(x, 3, scoring_func="sigmoid", e_score_correction_bias=bias)
    assert (ids[:, 0] == 7).all() and (ids >= 0).all()
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert ids_of(fused_topk(x - 1e30, 3)) == [[0, 1, 2]] * 4  # all equal in fp32


def test_bias_selects_but_does_not_weigh(fused_topk):
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([10.0, 0.0, 5.0, 0.0])
    weights, ids = fused_topk(x, 2, scoring_func="sigmoid", e_score_correction_bias=bias)
    assert ids.tolist() == [[0, 2]]
    assert_close(weights, torch.sigmoid(torch.tensor([[0.0, 2.0]])))


def test_bias_does_not_revive_a_masked_expert(fused_topk):
    x = torch.tensor([[-INF, 0.0, 0.0, NAN]])
    bias = torch.tensor([100.0, NAN, -5.0, 100.0])
    _, ids = fused_topk(x, 4, scoring_func="sigmoid", e_score_correction_bias=bias)
    assert ids.tolist() == [[2, 0, 1, 3]]


def test_losing_groups_stay_out_even_below_minus_infinity(fused_topk):
    x = torch.tensor([[5.0, -INF, -INF, 1.0, 1.0, 1.0]])
    _, ids = fused_topk(x, 3, num_expert_group=2, topk_group=1, group_score="max")
    assert ids.tolist() == [[0, 1, 2]]
    bias = torch.tensor([-9.0, -9.0, -9.0, 1.0, -7.0, -7.0])
    _, ids = fused_topk(
        torch.zeros(1, 6), 3, scoring_func="sigmoid", e_score_correction_bias=bias,
        num_expert_group=2, topk_group=1,
    )  # fmt: skip
    assert ids.tolist() == [[3, 4, 5]]  # negative biased scores, not the losers' zeros


def test_group_score_is_the_sum_of_two_or_the_maximum(fused_topk):
    x = torch.tensor([[9.0, 0.0, 0.0, 6.0, 5.0, 0.0]])
    pair = dict(scoring_func="none", num_expert_group=2, topk_group=1)
    assert ids_of(fused_topk(x, 2, group_score="top2_sum", **pair)) == [[3, 4]]
    assert ids_of(fused_topk(x, 2, group_score="max", **pair)) == [[0, 1]]
    single = dict(scoring_func="none", num_expert_group=6, topk_group=2)
    assert ids_of(fused_topk(x, 2, **single)) == [[0, 3]]  # one expert a group: its score alone
    tied = dict(scoring_func="none", num_expert_group=3, topk_group=1)
    assert ids_of(fused_topk(torch.ones(1, 6), 2, **tied)) == [[0, 1]]


def test_renormalization_of_vanishing_scores(fused_topk):
    x = torch.full((1, 4), -200.0)  # sigmoid underflows to 0
    weights, _ = fused_topk(x, 2, scoring_func="sigmoid", renormalize=True)
    assert weights.tolist() == [[0.0, 0.0]]
    weights, _ = fused_topk(
        torch.zeros(1, 4), 2, scoring_func="sigmoid", renormalize=True, renorm_eps=1.0
    )
    assert_close(weights, torch.full((1, 2), 0.25))


def test_sqrtsoftplus_far_from_zero(fused_topk):
    x = torch.tensor([[60.0, 30.0, 0.0, -30.0, -60.0, -80.0]])
    weights, _ = fused_topk(x, 6, scoring_func="sqrtsoftplus")
    want = torch.nn.functional.softplus(x.double(), threshold=1e9).sqrt().float()
    assert_close(weights, want, atol=0.0, rtol=2.0**-21)


def test_factor_scale_and_dtype(fused_topk):
    x = torch.randn(5, 8)
    scale = torch.rand(8)
    base, ids = fused_topk(x, 3, renormalize=True)
    weights, _ = fused_topk(
        x, 3, renormalize=True, routed_scaling_factor=2.5, per_expert_scale=scale
    )
    assert_close(weights, base * 2.5 * scale[ids.long()])
    half, _ = fused_topk(x, 3, renormalize=True, weights_dtype=torch.bfloat16)
    assert torch.equal(half, base.bfloat16())


def test_shared_experts_masks_and_maps(fused_topk):
    x = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    weights, ids = fused_topk(x, 2, num_fused_shared_experts=2, shared_expert_weight=0.25)
    assert ids.tolist() == [[2, 1, 3, 4], [0, 1, 3, 4]]
    assert weights[:, 2:].tolist() == [[0.25, 0.25]] * 2
    assert_close(weights[:, :2], fused_topk(x, 2)[0])
    weights, ids = fused_topk(
        x, 2, token_mask=torch.tensor([True, False]), num_fused_shared_experts=1
    )
    assert ids.tolist() == [[2, 1, 3], [-1, -1, -1]]
    assert weights[1].tolist() == [0.0] * 3
    weights, ids = fused_topk(
        x, 2, expert_map=torch.tensor([-1, 0, -7, 1]), num_fused_shared_experts=1
    )
    assert ids.tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert (weights[:, 0] == 0).all() and (weights[:, 1:] > 0).all()


def test_given_ids_are_only_weighed(fused_topk):
    x = torch.randn(3, 6)
    given = torch.tensor([[5, 5], [0, -1], [6, 2]])
    weights, ids = fused_topk(x, 2, topk_ids=given)
    assert ids.tolist() == [[5, 5], [0, -1], [-1, 2]]
    p = x.softmax(1)
    assert_close(
        weights,
        torch.stack(
            [p[0, [5, 5]], p[1, [0, 0]] * torch.tensor([1, 0]), p[2, [2, 2]] * torch.tensor([0, 1])]
        ),
    )
    weights, _ = fused_topk(x, 2, topk_ids=given, softmax_after_topk=True)
    assert_close(weights, torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]))
    huge = torch.tensor([[2**40, 2], [-(2**40), 1], [2**32, 0]])
    assert fused_topk(x, 2, topk_ids=huge)[1].tolist() == [[-1, 2], [-1, 1], [-1, 0]]


def test_choosing_and_replaying_give_the_same_weights(fused_topk):
    x = torch.randn(9, 20)
    for kwargs in (
        dict(renormalize=True),
        dict(softmax_after_topk=True),
        dict(scoring_func="sigmoid"),
    ):
        weights, ids = fused_topk(x, 4, **kwargs)
        again, same = fused_topk(x, 4, topk_ids=ids, **kwargs)
        assert torch.equal(ids, same) and torch.equal(weights, again)


def test_strides(fused_topk):
    base = torch.randn(12, 30)
    want = fused_topk(base[::2, 3:19].contiguous(), 4)
    for view in (base[::2, 3:19], base.t().contiguous().t()[::2, 3:19]):
        weights, ids = fused_topk(view, 4)
        assert torch.equal(ids, want[1])
        assert_close(weights, want[0])
    one = torch.randn(1, 8).expand(5, 8)
    assert ids_of(fused_topk(one, 2)) == ids_of(fused_topk(one.contiguous(), 2))


LOGIT = st.one_of(
    st.floats(-8, 8, width=16), st.sampled_from([0.0, 1.0, INF, -INF, NAN, 3e38, -3e38, 1e-40])
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_invariants_and_agreement(data):
    """For any logits and settings: ids unique and in range, keys in order, the same ids from every
    implementation, and weights that agree."""
    groups = data.draw(st.sampled_from([1, 1, 2, 4]))
    size = data.draw(st.integers(1, 12))
    keep = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, keep * size))
    experts = groups * size
    rows = data.draw(
        st.lists(st.lists(LOGIT, min_size=experts, max_size=experts), min_size=1, max_size=3)
    )
    settings_ = dict(
        scoring_func=data.draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "none"])),
        renormalize=data.draw(st.booleans()),
        num_expert_group=groups,
        topk_group=keep,
        group_score="max",
    )
    x = torch.tensor(rows, dtype=torch.float64).float()
    weights, ids = reference.fused_topk(x, top_k, **settings_)
    clean = torch.where(x.isnan(), -INF, x).clamp(max=torch.finfo(torch.float32).max)
    for row, chosen in zip(clean, ids.tolist(), strict=True):
        assert len(set(chosen)) == top_k and all(0 <= e < experts for e in chosen)
        assert len({e // size for e in chosen}) <= keep
        keys = [(-row[e].item(), e) for e in chosen]
        assert keys == sorted(keys)
    for backend in registry.implementations("fused_topk")["fused_topk"]:
        if backend == "triton":
            continue
        got_weights, got = moesaic.fused_topk(x, top_k, **settings_, backend=backend)
        assert torch.equal(got, ids)
        assert_close(got_weights, weights, equal_nan=True)


def test_gradient_flows_through_the_chosen_weights_only():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for kwargs in (
        dict(renormalize=True),
        dict(softmax_after_topk=True),
        dict(scoring_func="sigmoid", renormalize=True, e_score_correction_bias=bias),
        dict(scoring_func="sqrtsoftplus", routed_scaling_factor=1.5),
    ):
        assert torch.autograd.gradcheck(
            lambda x, kw=kwargs: moesaic.fused_topk(x, 3, **kw)[0], (x,)
        )
    weights, _ = moesaic.fused_topk(x, 3, scoring_func="sigmoid", e_score_correction_bias=bias)
    weights.sum().backward()
    assert bias.grad is None and x.grad is not None
    far = torch.tensor([[-90.0, NAN, -INF, 3.0]], requires_grad=True)
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus", "none"):
        (grad,) = torch.autograd.grad(
            moesaic.fused_topk(far, 4, scoring_func=scoring, renormalize=True)[0][0, 0], far
        )
        assert not grad.isnan().any()
