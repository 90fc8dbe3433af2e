"""Sorting, grouped matmul, activations and expert layers by hand and against torch."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.testing import assert_close

import moesaic
from moesaic import MXFP4, registry
from moesaic.reference import moe as reference

NAN = float("nan")


def backends(op):
    return [b for b in ("reference", "cpu") if b in registry.implementations(op)[op]]


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.lists(st.integers(-2, 9), min_size=3, max_size=3), max_size=12),
    experts=st.integers(1, 8),
    block=st.integers(1, 9),
)
def test_sorting_is_a_stable_bijection(ids, experts, block):
    topk_ids = torch.tensor(ids, dtype=torch.int32).reshape(-1, 3)
    flat = topk_ids.flatten().tolist()
    perm, inverse, offs = (t.tolist() for t in moesaic.moe_sort(topk_ids, experts))
    assert sorted(perm) == list(range(len(flat)))
    starts = [0, *offs]
    for e in range(experts):
        assert perm[starts[e] : starts[e + 1]] == [s for s, i in enumerate(flat) if i == e]
    dropped = [s for s, i in enumerate(flat) if not 0 <= i < experts]
    assert perm[offs[-1] :] == dropped
    for slot, place in enumerate(place for row in inverse for place in row):
        assert place == -1 if slot in dropped else perm[place] == slot

    rows, block_experts, total = moesaic.moe_align_block_size(
        topk_ids, block, experts, pad_sorted_ids=True
    )
    used = []
    for b in range(int(total) // block):
        slots = [s for s in rows[b * block : (b + 1) * block].tolist() if s < len(flat)]
        assert slots and all(flat[s] == block_experts[b] for s in slots)
        used += slots
    assert used == perm[: offs[-1]]
    assert (rows[int(total) :] == len(flat)).all()
    assert (block_experts[int(total) // block :] == -1).all()


def test_align_by_hand():
    ids = torch.tensor([[2, 0], [2, -1], [5, 2]])
    rows, experts, total = moesaic.moe_align_block_size(ids, 2, 3)
    assert rows.tolist() == [1, 6, 0, 2, 5, 6, 6, 6, 6]
    assert experts.tolist() == [0, 2, 2, -1, -1] and total.tolist() == [6]
    mapped = torch.tensor([-1, 0, 1, -1, -1, 0])
    rows, experts, total = moesaic.moe_align_block_size(ids, 2, 2, expert_map=mapped)
    assert rows[: int(total)].tolist() == [4, 6, 0, 2, 5, 6]
    assert experts[:3].tolist() == [0, 1, 1]


def test_permute_there_and_back():
    x = torch.randn(6, 5)
    ids = torch.tensor([[0, 3], [3, 1], [-1, 0], [4, 4], [9, 2], [1, 1]])
    perm, inverse, _ = moesaic.moe_sort(ids, 5)
    rows = moesaic.moe_permute(x, perm, 2)
    assert torch.equal(rows, x[perm.long() // 2])
    kept = ((ids >= 0) & (ids < 5)).float()
    assert torch.equal(moesaic.moe_unpermute(rows, inverse), x * kept.sum(1, keepdim=True))
    weights = torch.rand(6, 2)
    back = moesaic.moe_unpermute(rows, inverse, weights)
    assert_close(back, x * (kept * weights).sum(1, keepdim=True))
    rows[perm.long() == 4] = NAN  # the row of a dropped slot: whatever it holds
    weights[kept == 0] = NAN
    assert torch.equal(moesaic.moe_unpermute(rows, inverse, weights), back)


def test_grouped_mm_against_torch():
    a, w = torch.randn(24, 32).bfloat16(), torch.randn(4, 16, 32).bfloat16()
    offs = torch.tensor([8, 8, 16, 24], dtype=torch.int32)
    want = F.grouped_mm(a, w.transpose(1, 2), offs=offs)
    assert_close(moesaic.grouped_mm(a, w, offs), want)
    ids = torch.tensor([0] * 8 + [2] * 8 + [3] * 8)
    assert torch.equal(moesaic.grouped_mm(a, w, expert_ids=ids), moesaic.grouped_mm(a, w, offs))
    held = w.transpose(1, 2).contiguous()
    assert_close(moesaic.grouped_mm(a, held, offs, transposed=True), want)


def test_grouped_mm_skips_rows_past_the_end():
    a, w = torch.randn(5, 3), torch.randn(2, 4, 3)
    a[3:] = NAN
    out = moesaic.grouped_mm(a, w, torch.tensor([1, 3]), bias=torch.ones(2, 4))
    assert_close(out[:1], a[:1] @ w[0].T + 1)
    assert_close(out[1:3], a[1:3] @ w[1].T + 1)
    assert (out[3:] == 0).all()


def test_activations_by_their_formulas():
    x = 8 * torch.randn(3, 40, dtype=torch.float64)
    g, u = x.chunk(2, dim=1)
    gc, uc = g.clamp(max=7), u.clamp(-7, 7)
    want = {
        "silu": g / (1 + torch.exp(-g)) * u,
        "gelu": g * 0.5 * (1 + torch.erf(g / 2**0.5)) * u,
        "gelu_tanh": F.gelu(g, approximate="tanh") * u,
        "swigluoai": (uc + 1) * gc / (1 + torch.exp(-1.702 * gc)),
        "swiglustep": (g * torch.sigmoid(g)).clamp(max=7) * uc,
        "situ": 4 * torch.tanh(g / 4) * torch.sigmoid(g) * 25 * torch.tanh(u / 25),
    }
    zipped = torch.stack([g, u], dim=-1).flatten(1)
    for name, expected in want.items():
        assert_close(moesaic.moe_activation(x, name), expected)
        assert_close(moesaic.moe_activation(zipped, name, interleaved=True), expected)
    assert_close(moesaic.moe_activation(x, "relu2"), torch.relu(x) ** 2)
    limited = moesaic.moe_activation(x, "silu", limit=1.5)
    assert_close(limited, F.silu(g.clamp(max=1.5)) * u.clamp(-1.5, 1.5))
    unlimited = moesaic.moe_activation(x, "swigluoai", alpha=1.0, limit=float("inf"))
    assert_close(unlimited, (u + 1) * g * torch.sigmoid(g))


@pytest.fixture(params=backends("fused_experts"))
def fused_experts(request):
    return lambda *args, **kwargs: moesaic.fused_experts(*args, **kwargs, backend=request.param)


def layer(tokens=5, experts=4, top_k=2, hidden=12, inner=8):
    x = torch.randn(tokens, hidden)
    w13 = torch.randn(experts, 2 * inner, hidden) / 3
    w2 = torch.randn(experts, hidden, inner) / 3
    weights = torch.rand(tokens, top_k)
    ids = torch.randint(0, experts, (tokens, top_k))
    return x, w13, w2, weights, ids


def one_expert(x, w13, w2, e):
    g, u = (x @ w13[e].T).chunk(2, dim=-1)
    return (F.silu(g) * u) @ w2[e].T


def test_against_a_loop(fused_experts):
    x, w13, w2, weights, ids = layer(tokens=7)
    ids[0] = torch.tensor([2, 2])  # a duplicate counts twice
    want = torch.stack(
        [
            sum(w * one_expert(x[t], w13, w2, e) for w, e in zip(weights[t], ids[t], strict=True))
            for t in range(7)
        ]
    )
    assert_close(fused_experts(x, w13, w2, weights, ids), want)


def test_skipped_slots_contribute_exactly_nothing(fused_experts):
    x, w13, w2, weights, ids = layer()
    w13[3], w2[3] = NAN, NAN  # an expert that nobody asks for
    ids %= 3
    ids[:, 1] = torch.tensor([-1, 4, 2**31 - 1, -(2**31), 2**40])
    weights[:, 1] = NAN
    want = fused_experts(x, w13, w2, weights[:, :1], ids[:, :1])
    assert not want.isnan().any()
    assert torch.equal(fused_experts(x, w13, w2, weights, ids), want)
    nowhere = fused_experts(x, w13, w2, weights, torch.full_like(ids, -1))
    assert torch.equal(nowhere, torch.zeros_like(x))


def test_nan_stays_in_its_row(fused_experts):
    x, w13, w2, weights, ids = layer(tokens=20)
    want = fused_experts(x, w13, w2, weights, ids)
    x[3] = NAN
    got = fused_experts(x, w13, w2, weights, ids)
    assert got[3].isnan().all()
    keep = torch.arange(20) != 3
    assert torch.equal(got[keep], want[keep])


def test_expert_parallel_shards_add_up(fused_experts):
    x, w13, w2, weights, ids = layer(tokens=9, experts=6)
    whole = fused_experts(x, w13, w2, weights, ids)
    parts = []
    for local in (slice(0, 2), slice(2, 6)):
        count = local.stop - local.start
        expert_map = torch.full((6,), -1)
        expert_map[local] = torch.arange(count)
        parts.append(fused_experts(x, w13[local], w2[local], weights, ids, expert_map=expert_map))
    assert_close(sum(parts), whole)


def test_identity_experts_never_reach_the_weights(fused_experts):
    x, w13, w2, weights, _ = layer(experts=3)
    ids = torch.tensor([[3, 4], [0, 3], [5, 1], [-1, 4], [2, 0]])
    got = fused_experts(x, w13, w2, weights, ids, num_identity_experts=2)
    assert_close(got[0], (weights[0, 0] + weights[0, 1]) * x[0])
    assert_close(got[1], weights[1, 0] * one_expert(x[1], w13, w2, 0) + weights[1, 1] * x[1])
    assert_close(got[2], weights[2, 1] * one_expert(x[2], w13, w2, 1))
    assert_close(got[3], weights[3, 1] * x[3])


def test_weight_on_input_is_not_weight_on_output(fused_experts):
    x, w13, w2, weights, ids = layer(top_k=1)
    got = fused_experts(x, w13, w2, weights, ids, apply_router_weight_on_input=True)
    ones = torch.ones_like(weights)
    assert_close(got, fused_experts(x * weights, w13, w2, ones, ids))
    assert not torch.allclose(got, fused_experts(x, w13, w2, weights, ids))


def test_views_and_transposed_weights(fused_experts):
    x, w13, w2, weights, ids = layer(tokens=6)
    want = fused_experts(x, w13, w2, weights, ids)
    wide = torch.zeros(6, 24)
    wide[:, ::2] = x
    assert torch.equal(fused_experts(wide[:, ::2], w13, w2, weights, ids), want)
    flipped = [w.transpose(1, 2).contiguous() for w in (w13, w2)]
    assert_close(fused_experts(x, *flipped, weights, ids, transposed=True), want)
    same = x[:1].expand(6, 12)
    assert torch.equal(
        fused_experts(same, w13, w2, weights, ids),
        fused_experts(same.contiguous(), w13, w2, weights, ids),
    )
    assert torch.equal(fused_experts(x, w13, w2, weights.t().contiguous().t(), ids), want)


def test_packed_quantized_and_plain_weights_agree():
    if "cpu" not in backends("fused_experts"):
        pytest.skip("no C++ extension in this install")
    x, w13, w2, weights, ids = layer(tokens=6, hidden=64, inner=32)
    for pair in ((w13, w2), (moesaic.quantize(w13, MXFP4), moesaic.quantize(w2, MXFP4))):
        packed = [moesaic.pack_weight(w) for w in pair]
        want = moesaic.fused_experts(x, *packed, weights, ids, backend="cpu")
        assert torch.equal(moesaic.fused_experts(x, *pair, weights, ids, backend="cpu"), want)
        mixed = (packed[0], pair[1])
        assert torch.equal(moesaic.fused_experts(x, *mixed, weights, ids, backend="cpu"), want)
        assert_close(want, reference.fused_experts(x, *packed, weights, ids))


def test_a_chunk_of_tokens_does_not_show():
    """Long inputs are worked off in chunks that fit in scratch memory; the bits are the same."""
    if "cpu" not in backends("fused_experts"):
        pytest.skip("no C++ extension in this install")
    tokens, experts, hidden = 1500, 3, 32
    _, w13, w2, _, _ = layer(experts=experts, hidden=hidden, inner=3000)
    x = torch.randn(tokens, hidden)
    weights, ids = moesaic.fused_topk(torch.randn(tokens, experts), 3)
    ids = ids.repeat(1, 3)  # 9 slots of 3000 + 2 * 32 floats a token: more than one chunk
    weights = weights.repeat(1, 3)
    packed = moesaic.pack_weight(w13), moesaic.pack_weight(w2)
    whole = moesaic.fused_experts(x, *packed, weights, ids, backend="cpu")
    for rows in (slice(0, 1), slice(1190, 1230), slice(1499, 1500)):
        part = moesaic.fused_experts(x[rows], *packed, weights[rows], ids[rows], backend="cpu")
        assert torch.equal(part, whole[rows])


def test_gradients_reach_everything_that_takes_part():
    torch.set_default_dtype(torch.float64)
    try:
        x, w13, w2, weights, ids = layer(tokens=3, experts=3, hidden=4, inner=3)
        ids = torch.tensor([[0, 2], [2, -1], [0, 0]])
        biases = torch.randn(3, 6), torch.randn(3, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [t.requires_grad_() for t in (x, w13, w2, weights, *biases)]

    def call(x, w13, w2, weights, b13, b2):
        return moesaic.fused_experts(
            x, w13, w2, weights, ids, w13_bias=b13, w2_bias=b2, activation="swigluoai"
        )

    assert torch.autograd.gradcheck(call, tensors)
    call(*tensors).sum().backward()
    assert (w13.grad[1] == 0).all() and (w2.grad[1] == 0).all()  # written, not left out
    assert weights.grad[1, 1] == 0


def test_fused_moe_is_routing_then_experts():
    x, w13, w2, _, _ = layer(tokens=8)
    logits = torch.randn(8, 4)
    weights, ids = moesaic.fused_topk(logits, 2, renormalize=True)
    want = moesaic.fused_experts(x, w13, w2, weights, ids)
    assert torch.equal(moesaic.fused_moe(x, w13, w2, logits, 2, renormalize=True), want)
