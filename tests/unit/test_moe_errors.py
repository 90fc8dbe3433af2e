# A row of the table is a call and its whole message, however long.
# ruff: noqa: E501
"""Every documented error of the moe doors, with its message."""

import re

import pytest
import torch

import moesaic
from moesaic import FP8_ROW, MXFP4

X = torch.randn(4, 8)
W13, W2 = torch.randn(3, 12, 8), torch.randn(3, 8, 6)
TW, TI = torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int32)
LOGITS = torch.randn(4, 6)


def topk(*args, **kwargs):
    return lambda: moesaic.fused_topk(*args, **kwargs)


def experts(x=X, w13=W13, w2=W2, weights=TW, ids=TI, **kwargs):
    return lambda: moesaic.fused_experts(x, w13, w2, weights, ids, **kwargs)


def grouped(*args, **kwargs):
    return lambda: moesaic.grouped_mm(*args, **kwargs)


CASES = [
    (topk([1.0], 1), TypeError, "fused_topk: router_logits: expected a torch.Tensor, got list"),
    (topk(X[0], 1), ValueError, "fused_topk: router_logits: expected 2 dimensions, got float32 [8]"),
    (topk(X.int(), 1), TypeError, "fused_topk: router_logits: expected float32, bfloat16, float16 or float64, got int32 [4, 8]"),
    (topk(X[:, :0], 1), ValueError, "fused_topk: router_logits: expected at least one expert, got float32 [4, 0]"),
    (topk(LOGITS, 7), ValueError, "fused_topk: top_k: expected an int in [1, 6], got 7"),
    (topk(LOGITS, 0), ValueError, "fused_topk: top_k: expected an int in [1, 6], got 0"),
    (topk(LOGITS, 2.0), TypeError, "fused_topk: top_k: expected an int, got float"),
    (topk(LOGITS, 2, scoring_func="relu"), ValueError, "fused_topk: scoring_func: expected one of 'softmax', 'sigmoid', 'sqrtsoftplus', 'none', got 'relu'"),
    (topk(LOGITS, 2, group_score="min"), ValueError, "fused_topk: group_score: expected one of 'top2_sum', 'max', got 'min'"),
    (topk(LOGITS, 2, softmax_after_topk=True, scoring_func="sigmoid"), ValueError, "fused_topk: softmax_after_topk: expected False unless scoring_func is 'softmax', got True"),
    (topk(LOGITS, 2, renormalize=1), TypeError, "fused_topk: renormalize: expected a bool, got int"),
    (topk(LOGITS, 2, num_expert_group=4), ValueError, "fused_topk: num_expert_group: expected a divisor of the 6 experts, got 4"),
    (topk(LOGITS, 2, num_expert_group=2, topk_group=3), ValueError, "fused_topk: topk_group: expected an int in [1, 2], got 3"),
    (topk(LOGITS, 4, num_expert_group=2), ValueError, "fused_topk: topk_group: expected enough groups to choose 4 experts from, got 1 groups of 3 experts"),
    (topk(LOGITS, 2, e_score_correction_bias=torch.zeros(5)), ValueError, "fused_topk: e_score_correction_bias: expected shape [6], got float32 [5]"),
    (topk(LOGITS, 2, per_expert_scale=torch.zeros(6).int()), TypeError, "fused_topk: per_expert_scale: expected float32, bfloat16, float16 or float64, got int32 [6]"),
    (topk(LOGITS, 2, token_mask=torch.ones(4)), TypeError, "fused_topk: token_mask: expected bool, got float32 [4]"),
    (topk(LOGITS, 2, topk_ids=TI[:, :1]), ValueError, "fused_topk: topk_ids: expected shape [4, 2], got int32 [4, 1]"),
    (topk(LOGITS, 2, topk_ids=TI.float()), TypeError, "fused_topk: topk_ids: expected int32 or int64, got float32 [4, 2]"),
    (topk(LOGITS, 2, expert_map=TI[:, 0], num_fused_shared_experts=1), ValueError, "fused_topk: expert_map: expected shape [7], got int32 [4]"),
    (topk(LOGITS, 2, weights_dtype=torch.int32), TypeError, "fused_topk: weights_dtype: expected float32, bfloat16, float16 or float64, got torch.int32"),
    (topk(LOGITS, 2, renorm_eps="x"), TypeError, "fused_topk: renorm_eps: expected a number, got str"),
    (topk(LOGITS, 2, e_score_correction_bias=torch.zeros(6, device="meta")), ValueError, "fused_topk: e_score_correction_bias: expected a tensor on cpu, got one on meta"),
    (lambda: moesaic.moe_sort(TI.flatten(), 3), ValueError, "moe_sort: topk_ids: expected 2 dimensions, got int32 [8]"),
    (lambda: moesaic.moe_sort(TI, 0), ValueError, "moe_sort: num_experts: expected an int >= 1, got 0"),
    (lambda: moesaic.moe_align_block_size(TI, 0, 3), ValueError, "moe_align_block_size: block_size: expected an int >= 1, got 0"),
    (lambda: moesaic.moe_permute(X[0], TI[:, 0], 2), ValueError, "moe_permute: x: expected 2 dimensions, got float32 [8]"),
    (lambda: moesaic.moe_unpermute(X, TI, TW[:2]), ValueError, "moe_unpermute: topk_weights: expected shape [4, 2], got float32 [2, 2]"),
    (grouped(X, W13), ValueError, "grouped_mm: offs: expected exactly one of offs and expert_ids, got neither"),
    (grouped(X, W13, TI[:3, 0], expert_ids=TI[:, 0]), ValueError, "grouped_mm: offs: expected exactly one of offs and expert_ids, got both"),
    (grouped(X, W2, TI[:3, 0]), ValueError, "grouped_mm: weight: expected shape [any, any, 8], got float32 [3, 8, 6]"),
    (grouped(X, W13, TI[:2, 0]), ValueError, "grouped_mm: offs: expected shape [3], got int32 [2]"),
    (grouped(X, W13.int(), TI[:3, 0]), TypeError, "grouped_mm: weight: expected float32, bfloat16, float16 or float64, got int32 [3, 12, 8]. Wrap codes and scales in a moesaic.QuantTensor"),
    (lambda: moesaic.moe_activation(X, "tanh"), ValueError, "moe_activation: activation: expected one of 'silu', 'gelu', 'gelu_tanh', 'swigluoai', 'swiglustep', 'situ', 'relu2', 'silu_no_mul', 'gelu_no_mul', got 'tanh'"),
    (lambda: moesaic.moe_activation(X[:, :7]), ValueError, "moe_activation: x: expected an even last dimension holding gate and up, got float32 [4, 7]"),
    (lambda: moesaic.moe_activation(X, limit=0), ValueError, "moe_activation: limit: expected a number > 0 (inf for no limit), got 0.0"),
    (experts(x=X[0]), ValueError, "fused_experts: hidden_states: expected 2 dimensions, got float32 [8]"),
    (experts(w13=W13[0]), ValueError, "fused_experts: w13: expected shape [any, any, 8], got float32 [12, 8]"),
    (experts(w13=W13[:, :11]), ValueError, "fused_experts: w13: expected an even number of rows, gate and up, got [3, 11, 8]"),
    (experts(w13="w"), TypeError, "fused_experts: w13: expected a floating torch.Tensor, a QuantTensor or a PackedWeight, got str"),
    (experts(w2=W2[:2]), ValueError, "fused_experts: w2: expected shape [3, 8, 6], got float32 [2, 8, 6]"),
    (experts(w2=moesaic.quantize(W13, FP8_ROW)), ValueError, "fused_experts: w2: expected shape [3, 8, 6], got QuantTensor [3, 12, 8]"),
    (experts(w13=moesaic.quantize(W13, MXFP4), transposed=True), TypeError, "fused_experts: w13: expected a floating torch.Tensor with transposed=True, got a QuantTensor"),
    (experts(weights=TW[:3]), ValueError, "fused_experts: topk_weights: expected shape [4, any], got float32 [3, 2]"),
    (experts(ids=TI[:, :1]), ValueError, "fused_experts: topk_ids: expected shape [4, 2], got int32 [4, 1]"),
    (experts(w13_bias=torch.zeros(3, 8)), ValueError, "fused_experts: w13_bias: expected shape [3, 12], got float32 [3, 8]"),
    (experts(w2_bias=torch.zeros(3, 12)), ValueError, "fused_experts: w2_bias: expected shape [3, 8], got float32 [3, 12]"),
    (experts(apply_router_weight_on_input=True), ValueError, "fused_experts: apply_router_weight_on_input: expected False unless top_k is 1, got True with top_k 2"),
    (experts(num_identity_experts=-1), ValueError, "fused_experts: num_identity_experts: expected an int in [0, 1073741824], got -1"),
    (experts(expert_map=TI), ValueError, "fused_experts: expert_map: expected 1 dimensions, got int32 [4, 2]"),
    (experts(shared_w13=W13[0]), TypeError, "fused_experts: shared_w2: expected a torch.Tensor, got NoneType"),
    (experts(shared_gate=X[:1]), ValueError, "fused_experts: shared_gate: expected None without shared_w13 and shared_w2, got a tensor"),
    (experts(backend="gpu"), ValueError, "moesaic: backend: expected one of cpu, triton, reference, got 'gpu'"),
    (lambda: moesaic.fused_moe(X, W13, W2, LOGITS[:3], 2), ValueError, "fused_moe: router_logits: expected shape [4, any], got float32 [3, 6]"),
    (lambda: moesaic.fused_moe(X, W13, W2, LOGITS, 2, num_identity_experts=2, num_fused_shared_experts=1), ValueError, "fused_moe: num_fused_shared_experts: expected 0 together with identity experts, got 1. Pass the shared expert as shared_w13 and shared_w2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=[c[2][:60] for c in CASES])
def test_error(call, kind, message):
    with pytest.raises(kind, match="^" + re.escape(message) + "$"):
        call()


def test_a_damaged_quant_tensor_is_refused():
    q = moesaic.quantize(W13, MXFP4)
    for field in ("data", "scale"):
        parts = dict(data=q.data, scale=q.scale, global_scale=None, format=q.format, shape=q.shape)
        parts[field] = parts[field][:, :-1]
        with pytest.raises(ValueError, match=f"fused_experts: w13.{field}: expected shape"):
            experts(w13=moesaic.QuantTensor(**parts))()


def test_what_a_forced_backend_cannot_serve_has_a_reason():
    if "cpu" not in moesaic.implementations("fused_experts")["fused_experts"]:
        pytest.skip("no C++ extension in this install")
    with pytest.raises(NotImplementedError, match="no kernel for the activation 'gelu'"):
        experts(activation="gelu", backend="cpu")()
    with pytest.raises(NotImplementedError, match="float64 is computed by the reference only"):
        experts(x=X.double(), w13=W13.double(), w2=W2.double(), backend="cpu")()
    with pytest.raises(NotImplementedError, match="no kernel for separate shared experts"):
        experts(shared_w13=W13[0], shared_w2=W2[0], backend="cpu")()
