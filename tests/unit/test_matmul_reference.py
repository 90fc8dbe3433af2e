"""The definitions of the matmul room: exact decoding, one rounding, fp32 bias, torch.scaled_mm."""

import math

import pytest
import torch
from torch.nn.functional import ScalingType, linear
from torch.nn.functional import scaled_mm as torch_scaled_mm

from moesaic.formats import (
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    FP8_E5M2_ROW,
    FP8_ROW,
    FP8_TENSOR,
    INT8,
    MXFP4,
    NVFP4,
    PRESETS,
    PackedWeight,
    QuantTensor,
)
from moesaic.reference.matmul import (
    INT16_MAX,
    pack_weight,
    quant_linear,
    scaled_mm,
    unpack_weight,
)
from moesaic.reference.quant import dequantize, quantize


def raw(t):
    return t if t is None else t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", PRESETS)
def test_unpack_restores_every_bit(name):
    x = torch.randn(3, 7, 45)
    x[1, 2, 3] = math.nan
    q = quantize(x, PRESETS[name])
    packed = pack_weight(q)
    assert isinstance(packed, PackedWeight) and packed.shape == (3, 7, 45)
    assert packed.nbytes == q.nbytes and packed.format == str(q.format)
    back = unpack_weight(packed)
    assert (back.format, back.shape) == (q.format, q.shape)
    for name in ("data", "scale", "global_scale"):
        got, want = getattr(back, name), getattr(q, name)
        assert (got is None) == (want is None)
        assert want is None or (got.dtype == want.dtype and torch.equal(raw(got), raw(want)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_weights_round_trip(dtype):
    w = torch.randn(5, 9, dtype=dtype).t()
    packed = pack_weight(w)
    assert packed.format == "dense:" + str(dtype).removeprefix("torch.")
    assert torch.equal(unpack_weight(packed), w)


def test_plain_layout_holds_the_bytes_of_the_checkpoint():
    q = quantize(torch.tensor([[1.0, -6.0, 0.5]]), MXFP4)
    assert pack_weight(q).data.tolist() == [[0xF2, 0x01]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "FP8_ROW", "FP8_BLOCK_128X128", "MXINT8"])
def test_weight_only_is_exact_up_to_the_order_of_fp32_sums(name, dtype):
    x, w, bias = torch.randn(2, 3, 200), torch.randn(150, 200), torch.randn(150)
    x, bias = x.to(dtype), bias.to(dtype)
    q = quantize(w, PRESETS[name])
    gold = linear(x.double(), dequantize(q, torch.float64), bias.double())
    got = quant_linear(x, pack_weight(q), bias)
    assert got.dtype == dtype and got.shape == (2, 3, 150)
    bound = 200 * 2.0**-24 * linear(x.double().abs(), dequantize(q, torch.float64).abs()) + 1e-7
    bound = bound + torch.finfo(dtype).eps * gold.abs()
    assert ((got.double() - gold).abs() <= bound).all()
    wide = quant_linear(x.double(), pack_weight(q), bias.double())
    assert wide.dtype == torch.float64 and (wide - gold).abs().max() < 1e-12
    assert quant_linear(x, pack_weight(q), out_dtype=torch.float32).dtype == torch.float32


def test_exact_grid_gives_exact_results():
    """Small integers times powers of two: every sum is exact, so equality is required."""
    x = torch.randint(-3, 4, (9, 96)).float()
    w = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])[torch.randint(8, (40, 96))]
    w = w * torch.exp2(torch.randint(-3, 4, (40, 3)).float()).repeat_interleave(32, 1)
    w[:, ::32] = 6 * torch.exp2(torch.randint(-3, 4, (40, 3)).float())  # amax pins the scale
    q = quantize(w, MXFP4)
    exact = dequantize(q, torch.float64)
    assert torch.equal(quant_linear(x, pack_weight(q)).double(), x.double() @ exact.t())


def test_bias_is_added_before_the_only_rounding():
    x = torch.tensor([[1.0]], dtype=torch.bfloat16)
    packed = pack_weight(torch.tensor([[1.00390625]]))  # 1 + 2^-8: a tie in bf16
    bias = torch.tensor([2.0**-10], dtype=torch.bfloat16)
    assert quant_linear(x, packed).item() == 1.0
    assert quant_linear(x, packed, bias).item() == 1.0078125


def test_int8_activations_are_quantized_by_the_int8_format():
    x = torch.randn(4, 70)
    x[1] = 0
    q = quantize(torch.randn(30, 70), MXFP4)
    want = dequantize(quantize(x, INT8)) @ dequantize(q).t()
    assert torch.equal(quant_linear(x, pack_weight(q), activation="int8"), want)
    assert torch.equal(quant_linear(x, pack_weight(q), activation=INT8), want)
    fp8 = dequantize(quantize(x, FP8_BLOCK_1X128)) @ dequantize(q).t()
    assert torch.equal(quant_linear(x, pack_weight(q), activation=FP8_BLOCK_1X128), fp8)
    assert not torch.equal(want, fp8)


def test_int16_activations_are_near_lossless_and_split_into_two_int8_planes():
    x = torch.randn(64, 77).double()
    identity = pack_weight(torch.eye(77, dtype=torch.float64))
    kept = quant_linear(x, identity, activation="int16")
    sqnr = 10 * torch.log10(x.square().sum() / (x - kept).square().sum())
    assert 88 < sqnr < 110
    blocks = torch.nn.functional.pad(x, (0, 19)).unflatten(-1, (3, 32))
    scale = (blocks.abs().amax(-1, keepdim=True).float() / INT16_MAX).double()
    codes = torch.nn.functional.pad(kept, (0, 19)).unflatten(-1, (3, 32)) / scale
    assert (codes - codes.round()).abs().max() < 1e-9
    codes = codes.round().long()
    high = (codes + 128) >> 8
    low = codes - 256 * high
    assert high.abs().max() == 127 and low.min() >= -128 and low.max() <= 127


def test_int16_activations_follow_the_policies_of_blocks():
    x = torch.zeros(4, 32, dtype=torch.float64)
    x[1, 3], x[2, 5], x[3, 7] = math.nan, math.inf, 1e-44
    x[1, 0] = 1
    kept = quant_linear(x, pack_weight(torch.eye(32, dtype=torch.float64)), activation="int16")
    eye_times = torch.zeros(32, dtype=torch.float64)
    assert torch.equal(kept[0], eye_times)
    assert kept[1].isnan().all()
    assert kept[2, 5] == pytest.approx(torch.finfo(torch.float32).max, rel=1e-6)
    assert kept[3].abs().max() < 2.0**-126


def test_gradients_flow_through_the_definition():
    x = torch.randn(3, 64, requires_grad=True)
    q = quantize(torch.randn(8, 64), MXFP4)
    w = dequantize(q)
    for activation in (None, "int8", "int16"):
        x.grad = None
        quant_linear(x, pack_weight(q), activation=activation).sum().backward()
        torch.testing.assert_close(x.grad, w.sum(0).expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_mm_matches_torch(rows, dtype):
    format = FP8_ROW if rows else FP8_TENSOR
    a, b = quantize(torch.randn(32, 64), format), quantize(torch.randn(48, 64), format)
    recipe = ScalingType.RowWise if rows else ScalingType.TensorWise
    scales = (a.scale, b.scale.t()) if rows else (a.scale[0, 0], b.scale[0, 0])
    want = torch_scaled_mm(
        a.data, b.data.t(), scales[0], recipe, scales[1], recipe, output_dtype=dtype
    )
    gold = scaled_mm(a, b, out_dtype=torch.float64)
    got = scaled_mm(a, b, out_dtype=dtype)
    limit = 2 * (want.double() - gold).abs().max() + torch.finfo(dtype).eps * gold.abs()
    assert got.dtype == dtype and ((got.double() - gold).abs() <= limit).all()
    assert (want.double() - gold).abs().max() < 0.02 * gold.abs().max()


@pytest.mark.parametrize(
    ("left", "right"),
    [(FP8_BLOCK_1X128, FP8_BLOCK_128X128), (MXFP4, MXFP4), (NVFP4, NVFP4), (FP8_E5M2_ROW, MXFP4)],
    ids=str,
)
def test_scaled_mm_of_any_two_formats(left, right):
    a, b = quantize(torch.randn(2, 5, 200), left), quantize(torch.randn(131, 200), right)
    bias = torch.randn(131)
    gold = dequantize(a, torch.float64) @ dequantize(b, torch.float64).t() + bias
    assert torch.equal(scaled_mm(a, b, bias, out_dtype=torch.float64), gold)
    assert scaled_mm(a, b, bias).dtype == torch.bfloat16
    torch.testing.assert_close(
        scaled_mm(a, b, bias, out_dtype=torch.float32).double(), gold, rtol=1e-5, atol=1e-4
    )


def test_fused_shards_keep_their_own_global_scales():
    """Rows of one weight may have different global scales (fused q/k/v): exact, not a maximum."""
    parts = [quantize(s * torch.randn(8, 64), NVFP4) for s in (1.0, 37.0)]
    top = torch.cat([p.global_scale.expand(8, 1) for p in parts])
    fused = QuantTensor(
        torch.cat([p.data for p in parts]),
        torch.cat([p.scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn),
        top,
        NVFP4,
        (16, 64),
    )
    x = torch.randn(3, 64)
    want = torch.cat([quant_linear(x, pack_weight(p)) for p in parts], -1)
    torch.testing.assert_close(quant_linear(x, pack_weight(fused)), want, rtol=1e-6, atol=1e-5)
    assert torch.equal(dequantize(fused), torch.cat([dequantize(p) for p in parts]))


def test_empty_shapes():
    packed = pack_weight(quantize(torch.zeros(7, 0), MXFP4))
    for activation in (None, "int8", "int16"):
        out = quant_linear(torch.zeros(2, 0), packed, torch.ones(7), activation=activation)
        assert torch.equal(out, torch.ones(2, 7))
    none = pack_weight(quantize(torch.zeros(0, 32), FP8_ROW))
    assert quant_linear(torch.zeros(4, 32), none).shape == (4, 0)
