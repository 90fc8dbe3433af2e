"""Every documented error of the quant and matmul doors, with its message; a good call follows."""

import re

import pytest
import torch

import moesaic
from moesaic.formats import (
    FP8_BLOCK_128X128,
    FP8_ROW,
    MXFP4,
    NVFP4,
    QuantTensor,
)

X = torch.randn(4, 64)
Q = moesaic.quantize(X, MXFP4, backend="reference")
NV = moesaic.quantize(X, NVFP4, backend="reference")
W = moesaic.pack_weight(moesaic.quantize(torch.randn(6, 64), MXFP4, backend="reference"))


def q(**changes):
    fields = {f: getattr(Q, f) for f in ("data", "scale", "global_scale", "format", "shape")}
    return QuantTensor(**{**fields, **changes})


def quantize(x=X, format=MXFP4, **kwargs):
    return lambda: moesaic.quantize(x, format, **kwargs)


def linear(x=X, weight=W, bias=None, **kwargs):
    return lambda: moesaic.quant_linear(x, weight, bias, **kwargs)


STOCHASTIC = type(MXFP4)("e2m1", (1, 32), "e8m0", scale_rule="even", rounding="stochastic")

BAD = [
    (quantize([1.0]), TypeError, "quantize: x: expected a torch.Tensor, got list"),
    (quantize(X.int()), TypeError, "quantize: x: expected float32, .*got int32 [4, 64]"),
    (quantize(X.to(torch.float8_e4m3fn)), TypeError, "quantize: x: expected float32, .*float8"),
    (quantize(torch.tensor(1.0)), ValueError, "quantize: x: expected at least 1 dimension"),
    (
        quantize(format="MXFP4"),
        TypeError,
        "format: expected a QuantFormat, got str. Presets are in",
    ),
    (quantize(format=None), TypeError, "quantize: format: expected a QuantFormat, got NoneType"),
    (quantize(scale=1.0), TypeError, "quantize: scale: expected a torch.Tensor, got float"),
    (quantize(scale=torch.ones(1)), TypeError, "quantize: scale: expected uint8, got float32 [1]"),
    (
        quantize(scale=torch.ones(3, 2, dtype=torch.uint8)),
        ValueError,
        "quantize: scale: expected a shape that broadcasts to [4, 2], got uint8 [3, 2]",
    ),
    (
        quantize(global_scale=torch.ones(())),
        ValueError,
        "quantize: global_scale: expected None for e2m1:1x32:e8m0:even:rne, got float32 []",
    ),
    (quantize(global_scale="row"), ValueError, "quantize: global_scale: expected None for"),
    (
        quantize(format=NVFP4, global_scale="column"),
        ValueError,
        "quantize: global_scale: expected one of 'tensor', 'row', got 'column'",
    ),
    (
        quantize(format=NVFP4, global_scale=torch.ones(3, 1)),
        ValueError,
        "quantize: global_scale: expected a shape that broadcasts to [4, 1], got float32 [3, 1]",
    ),
    (
        quantize(format=NVFP4, global_scale=torch.ones((), dtype=torch.float64)),
        TypeError,
        "quantize: global_scale: expected float32, got float64 []",
    ),
    (
        quantize(format=type(NVFP4)("e2m1", (16, 16), "e4m3", True), global_scale="row"),
        ValueError,
        "quantize: global_scale: expected one per matrix for blocks of 16 rows, got one per row",
    ),
    (quantize(eps=-1.0), ValueError, "quantize: eps: expected a number >= 0, got -1.0"),
    (quantize(eps=float("nan")), ValueError, "quantize: eps: expected a number >= 0, got nan"),
    (quantize(eps="a"), TypeError, "quantize: eps: expected a number, got str"),
    (
        quantize(amax_ub=0),
        ValueError,
        "quantize: amax_ub: expected a positive number or None, got 0",
    ),
    (quantize(format=STOCHASTIC), ValueError, "seed: expected an int for stochastic rounding"),
    (quantize(format=STOCHASTIC, seed=-1), ValueError, "seed: expected an int in [0, 92233720"),
    (quantize(format=STOCHASTIC, seed=1.5), TypeError, "seed: expected an int, got float"),
    (
        quantize(format=STOCHASTIC, seed=1, backend="cpu"),
        NotImplementedError,
        "quantize: backend: 'cpu' cannot serve this call: ",
    ),
    (
        quantize(backend="gpu"),
        ValueError,
        "moesaic: backend: expected one of cpu, triton, reference",
    ),
    (
        lambda: moesaic.fake_quantize(X, MXFP4, clip_gradient=1),
        TypeError,
        "fake_quantize: clip_gradient: expected a bool, got int",
    ),
    (
        lambda: moesaic.dequantize(X),
        TypeError,
        "q: expected a QuantTensor, got Tensor. moesaic.quan",
    ),
    (lambda: moesaic.dequantize(Q, torch.int8), TypeError, "dequantize: dtype: expected float32"),
    (lambda: moesaic.dequantize(q(shape=(64,))), ValueError, "q.shape: expected at least 2 dimen"),
    (
        lambda: moesaic.dequantize(q(shape=(4, 66))),
        ValueError,
        "dequantize: q.data: expected shape [4, 33], got uint8 [4, 32]",
    ),
    (
        lambda: moesaic.dequantize(q(scale=Q.scale[:, :1])),
        ValueError,
        "dequantize: q.scale: expected shape [4, 2], got uint8 [4, 1]",
    ),
    (
        lambda: moesaic.dequantize(q(scale=Q.scale.float())),
        TypeError,
        "dequantize: q.scale: expected uint8, got float32 [4, 2]",
    ),
    (
        lambda: moesaic.dequantize(q(data=Q.data.to(torch.int8))),
        TypeError,
        "dequantize: q.data: expected uint8, got int8 [4, 32]",
    ),
    (
        lambda: moesaic.dequantize(q(global_scale=torch.ones(()))),
        ValueError,
        "dequantize: q.global_scale: expected None, got Tensor",
    ),
    (
        lambda: moesaic.dequantize(QuantTensor(NV.data, NV.scale, None, NVFP4, (4, 64))),
        ValueError,
        "q.global_scale: expected a tensor (the format has one), got NoneType",
    ),
    (
        lambda: moesaic.rms_norm_quantize(X, torch.ones(63), MXFP4),
        ValueError,
        "rms_norm_quantize: weight: expected shape [64], got float32 [63]",
    ),
    (
        lambda: moesaic.rms_norm_quantize(X, torch.ones(64), MXFP4, residual=X.half()),
        TypeError,
        "rms_norm_quantize: residual: expected float32, got float16 [4, 64]",
    ),
    (
        lambda: moesaic.rms_norm_quantize(X, torch.ones(64), MXFP4, norm_eps=None),
        TypeError,
        "rms_norm_quantize: norm_eps: expected a number, got NoneType",
    ),
    (
        lambda: moesaic.silu_mul_quantize(X[:, :5], MXFP4),
        ValueError,
        "silu_mul_quantize: x: expected an even last dimension (gate and up), got float32 [4, 5]",
    ),
    (
        lambda: moesaic.silu_mul_quantize(X, MXFP4, activation="gelu"),
        ValueError,
        "silu_mul_quantize: activation: expected one of 'silu', 'swigluoai', got 'gelu'",
    ),
    (
        lambda: moesaic.silu_mul_quantize(X, MXFP4, limit=0.0),
        ValueError,
        "silu_mul_quantize: limit: expected a positive number or None, got 0.0",
    ),
    (
        lambda: moesaic.quantization_error(X[:3], Q),
        ValueError,
        "quantization_error: x: expected the shape of q, [4, 64], got float32 [3, 64]",
    ),
    (
        lambda: moesaic.pack_weight(X.int()),
        TypeError,
        "pack_weight: weight: expected float32, .*got int32 [4, 64]. Quantize it",
    ),
    (lambda: moesaic.pack_weight(X[0]), ValueError, "weight: expected at least 2 dimensions"),
    (
        lambda: moesaic.unpack_weight(Q),
        TypeError,
        "unpack_weight: packed: expected a PackedWeight, got QuantTensor. moesaic.pack_weight",
    ),
    (linear(weight=Q), TypeError, "quant_linear: weight: expected a PackedWeight, got QuantTensor"),
    (
        linear(weight=moesaic.pack_weight(torch.randn(2, 6, 64))),
        ValueError,
        "quant_linear: weight: expected a weight [N, K], got [2, 6, 64]. Experts",
    ),
    (
        linear(x=X[:, :63]),
        ValueError,
        "quant_linear: x: expected a last dimension of 64 (the weight's K), got float32 [4, 63]",
    ),
    (
        linear(bias=torch.ones(7)),
        ValueError,
        "quant_linear: bias: expected shape [6], got float32 [7]",
    ),
    (
        linear(activation="int4"),
        ValueError,
        "activation: expected None, 'int8', 'int16' or a Quant",
    ),
    (
        linear(activation=FP8_BLOCK_128X128),
        ValueError,
        "quant_linear: activation: expected a format with blocks of one row, got e4m3fn:128x128",
    ),
    (
        linear(activation=NVFP4),
        ValueError,
        "activation: expected a format without stochastic rounding or global scale, got e2m1:1x16",
    ),
    (linear(out_dtype=torch.int32), TypeError, "quant_linear: out_dtype: expected float32"),
    (
        lambda: moesaic.scaled_mm(X, Q),
        TypeError,
        "scaled_mm: a: expected a QuantTensor, got Tensor",
    ),
    (
        lambda: moesaic.scaled_mm(Q, moesaic.quantize(X[:, :32], FP8_ROW)),
        ValueError,
        "scaled_mm: b: expected K = 64 as in a, got [4, 32]",
    ),
    (
        lambda: moesaic.scaled_mm(Q, moesaic.quantize(X[None], FP8_ROW)),
        ValueError,
        "scaled_mm: b: expected a matrix [N, K], got [1, 4, 64]",
    ),
    (
        lambda: moesaic.scaled_mm(Q, Q, torch.ones(3)),
        ValueError,
        "scaled_mm: bias: expected shape [4], got float32 [3]",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[m[:60] for _, _, m in BAD])
def test_the_documented_error(call, kind, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(kind, match=pattern):
        call()
    assert moesaic.quantize(X, MXFP4).shape == (4, 64)


def test_other_devices_are_told_apart():
    with pytest.raises(ValueError, match="scale: expected a tensor on cpu, got one on meta"):
        moesaic.quantize(X, MXFP4, scale=torch.ones(1, 1, dtype=torch.uint8, device="meta"))


def test_storage_types_that_mean_the_same_are_taken_alike():
    codes = Q.data.view(torch.float4_e2m1fn_x2)
    scales = Q.scale.view(torch.float8_e8m0fnu)
    want = moesaic.dequantize(Q)
    assert torch.equal(moesaic.dequantize(q(data=codes, scale=scales)), want)
    nv = QuantTensor(NV.data, NV.scale.view(torch.uint8), NV.global_scale, NVFP4, NV.shape)
    assert torch.equal(moesaic.dequantize(nv), moesaic.dequantize(NV))
    e8m0 = moesaic.quantize(X, MXFP4, scale=scales)
    assert torch.equal(e8m0.data, Q.data) and torch.equal(e8m0.scale, Q.scale)


def test_packing_cannot_be_traced():
    with pytest.raises(Exception, match="pack_weight: is not traceable; call it outside"):
        torch.compile(moesaic.pack_weight, fullgraph=True, backend="eager")(torch.randn(4, 4))
