"""The modules: same numbers as the ops, plain weights in state_dict whatever was packed."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import moesaic
from moesaic.cache import PagedKVCache
from moesaic.formats import FP8_BLOCK_128X128, FP8_ROW, MXFP4, NVFP4
from moesaic.nn import FusedMoE, PagedAttention, QuantLinear

FORMATS = [None, FP8_ROW, FP8_BLOCK_128X128, MXFP4, NVFP4]


def linear(fmt, n=48, k=64):
    return QuantLinear(torch.randn(n, k), torch.randn(n), format=fmt)


def experts(fmt=None, **kwargs):
    e, i, h = 4, 32, 64
    return FusedMoE(
        torch.randn(e, 2 * i, h), torch.randn(e, h, i), torch.randn(e, h), top_k=2, format=fmt,
        **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_linear_is_the_op(fmt):
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(3, 5, 64)
    layer = QuantLinear(weight, bias, format=fmt)
    packed = moesaic.pack_weight(weight if fmt is None else moesaic.quantize(weight, fmt))
    assert torch.equal(layer(x), moesaic.quant_linear(x, packed, bias))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("make", [linear, experts])
def test_state_dict_is_plain_and_loads_bit_for_bit(make, fmt):
    layer, other, x = make(fmt), make(fmt), torch.randn(2, 64)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    want = layer(x)  # packs
    after = layer.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)), key
    other(x)
    other.load_state_dict(after)
    assert torch.equal(other(x), want)


def test_quantized_pieces_have_their_own_names():
    assert set(linear(MXFP4).state_dict()) == {"weight", "weight_scale", "bias"}
    assert "w13_global_scale" in experts(NVFP4).state_dict()


def test_loading_names_what_is_wrong():
    layer = linear(MXFP4)
    state = layer.state_dict()
    del state["weight_scale"]
    state["weight"] = state["weight"][:1]
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "weight_scale"' in str(error.value)
    assert "weight: expected torch.uint8 [48, 32], got torch.uint8 [1, 32]" in str(error.value)


def test_a_change_of_dtype_leaves_codes_alone():
    layer = linear(FP8_ROW)
    codes = layer.state_dict()["weight"].view(torch.uint8).clone()
    layer.to(torch.bfloat16)
    state = layer.state_dict()
    assert state["bias"].dtype == torch.bfloat16
    assert state["weight_scale"].dtype == torch.float32
    assert torch.equal(state["weight"].view(torch.uint8), codes)
    dense = linear(None).to(torch.bfloat16)
    assert dense.state_dict()["weight"].dtype == torch.bfloat16


def test_bytes_are_those_of_the_format():
    layer = linear(MXFP4, n=64, k=128)
    layer(torch.randn(1, 128))
    assert layer.weight_nbytes() == 64 * 128 // 2 + 64 * 4 + 64 * 4  # codes, scales, bias


@pytest.mark.parametrize("unit_weights", [False, True])
def test_experts_are_a_weighted_sum_of_mlps(unit_weights):
    layer = experts(unit_weights=unit_weights, routing={"renormalize": True}).double()
    x = torch.randn(5, 64, dtype=torch.float64)
    state = layer.state_dict()
    scores = (x @ state["router_weight"].T).softmax(-1)
    weights, ids = scores.topk(2)
    weights = torch.ones_like(weights) if unit_weights else weights / weights.sum(-1, keepdim=True)
    want = torch.zeros_like(x)
    for t in range(5):
        for w, e in zip(weights[t], ids[t], strict=True):
            gate, up = (state["w13"][e] @ x[t]).chunk(2)
            want[t] += w * (state["w2"][e] @ (torch.nn.functional.silu(gate) * up))
    with moesaic.use_backend("reference"):
        layer.to("cpu")  # packed anew for this backend
        torch.testing.assert_close(layer(x), want)


def test_paged_attention_grows_token_by_token():
    cache = PagedKVCache(
        num_layers=1, num_blocks=4, num_kv_heads=2, head_dim=16, block_size=3, dtype=torch.float64
    )
    q, k, v = (torch.randn(7, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
    want = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0]
    want = want.transpose(0, 1)
    attend = PagedAttention()
    cache.allocate("s")
    rows = []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
        step = cache.append({"s": end - start})
        rows.append(attend(q[start:end], k[start:end], v[start:end], cache.k[0], cache.v[0], step))
    torch.testing.assert_close(torch.cat(rows), want)
