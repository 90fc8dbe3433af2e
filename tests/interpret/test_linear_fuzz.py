"""The weight-only linears on random shapes and strides, under the guard, against the definition."""

from dataclasses import replace

import pytest
import torch
from moesaic.kernels.matmul.w4a16 import mxfp4_linear
from moesaic.kernels.matmul.w8a16 import fp8_linear

from moesaic.formats import (
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    FP8_ROW,
    FP8_TENSOR,
    MXFP4,
    PRESETS,
    QuantTensor,
)
from moesaic.reference.quant import dequantize
from moesaic.testing import interpreter
from moesaic.testing.interpreter import ORDERS, checked
from moesaic.testing.metrics import same_bits, within

from .shapes import Draw

interpreter.install()

FP8 = (
    FP8_TENSOR,
    FP8_ROW,
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    PRESETS["FP8_BLOCK_128X128_UE8M0"],
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem(draw, m, n, k, dtype):
    x = draw.strided(draw.normal(m, k).to(dtype))
    data = draw.strided(draw.bytes(n, (k + 1) // 2))
    scale = draw.strided(draw.bytes(n, (k + 31) // 32, low=118, high=134))
    return x, data, scale


def weight(data, scale, n, k, dtype):
    return dequantize(
        QuantTensor(data.contiguous(), scale.contiguous(), None, MXFP4, (n, k)), dtype
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    draw = Draw(seed)
    m = draw.pick(1, 2, 3, 16, 17, 33, 70)
    n = draw.pick(1, 7, 64, 65, 130)
    k = draw.pick(1, 2, 31, 32, 33, 64, 96, 129, 191, 256)
    dtype, out_dtype = draw.pick(*DTYPES), draw.pick(*DTYPES)
    x, data, scale = problem(draw, m, n, k, dtype)
    bias = draw.pick(None, draw.normal(n).to(dtype))
    with checked(draw.pick(*ORDERS), seed=seed):
        out = mxfp4_linear(x, data, scale, bias, out_dtype)
        first = mxfp4_linear(x[:1], data, scale, bias, out_dtype)
    same_bits(f"first row, seed {seed}", first, out[:1])
    gold = x.double() @ weight(data, scale, n, k, torch.float64).T
    ref = x.float() @ weight(data, scale, n, k, torch.float32).T
    if bias is not None:
        gold, ref = gold + bias.double(), ref + bias.float()
    within(f"seed {seed}", out, ref.to(out_dtype), gold, terms=k)


def fp8_problem(draw, n, k):
    """Bytes without NaN codes, and scales in the format's shape and dtype."""
    fmt = replace(draw.pick(*FP8), element=draw.pick("e4m3fn", "e5m2"))
    data = draw.bytes(n, k, high=0x7B) | (draw.bytes(n, k, high=1) << 7)
    shape = fmt.scale_shape((n, k))
    scale = draw.bytes(*shape, low=120, high=132)
    if fmt.scale == "fp32":
        scale = draw.normal(*shape).abs() + 0.1
    return data, scale, fmt


@pytest.mark.parametrize("seed", range(24))
def test_random_fp8_shapes(seed):
    draw = Draw(1000 + seed)
    m, n = draw.pick(1, 2, 17, 70), draw.pick(1, 65, 130, 257)
    k = draw.pick(1, 63, 64, 65, 128, 129, 200, 320)
    dtype, out_dtype = draw.pick(*DTYPES), draw.pick(*DTYPES)
    x = draw.strided(draw.normal(m, k).to(dtype))
    data, scale, fmt = fp8_problem(draw, n, k)
    bias = draw.pick(None, draw.normal(n).to(dtype))
    how = {"element": fmt.element, "block": fmt.block}
    codes = draw.strided(data)
    with checked(draw.pick(*ORDERS), seed=seed):
        out = fp8_linear(x, codes, draw.strided(scale), bias, out_dtype, **how)
        first = fp8_linear(x[:1], codes, scale, bias, out_dtype, **how)
    same_bits(f"first row, seed {seed}", first, out[:1])
    weight = QuantTensor(data.view(fmt.data_dtype), scale, None, fmt, (n, k))
    gold = x.double() @ dequantize(weight, torch.float64).T
    ref = x.float() @ dequantize(weight, torch.float32).T
    if bias is not None:
        gold, ref = gold + bias.double(), ref + bias.float()
    within(f"seed {seed}", out, ref.to(out_dtype), gold, terms=k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_hold_an_activation_exactly(dtype):
    """x @ I, where I is made of MXFP4 ones, gives x back bit for bit."""
    draw = Draw(1)
    limit = 60 if dtype == torch.float32 else 12
    exponent = torch.randint(-limit, limit, (16, 64), generator=draw.generator)
    x = (draw.normal(16, 64) * torch.exp2(exponent.float())).to(dtype)
    codes = torch.eye(64, dtype=torch.uint8) * 2  # code 2 is 1.0
    data = codes[:, ::2] | (codes[:, 1::2] << 4)
    scale = torch.full((64, 2), 127, dtype=torch.uint8)
    with checked():
        out = mxfp4_linear(x, data, scale, None, dtype)
    same_bits(str(dtype), out, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_stay_in_their_row_and_block(dtype):
    x = torch.ones(4, 64, dtype=dtype)
    x[1, 3], x[2, 40] = torch.nan, torch.inf
    data = torch.full((3, 32), 0x22, dtype=torch.uint8)
    scale = torch.full((3, 2), 127, dtype=torch.uint8)
    scale[2, 1] = 255
    with checked():
        out = mxfp4_linear(x, data, scale, None, torch.float32)
    assert out[:, 2].isnan().all()
    assert out[:, :2].tolist()[0] == [64.0, 64.0] and out[3, :2].tolist() == [64.0, 64.0]
    assert out[1].isnan().all() and (out[2, :2] == torch.inf).all()


def test_the_pad_nibble_of_an_odd_k_is_not_looked_at():
    """Its product with nothing would be 0 * Inf: E2M1's 6 at the largest scale overflows."""
    data = torch.tensor([[0x20, 0x70]], dtype=torch.uint8)  # 0, 1, 0 and the pad
    scale = torch.tensor([[254]], dtype=torch.uint8)
    with checked():
        out = mxfp4_linear(torch.tensor([[1.0, 2.0**-127, 1.0]]), data, scale, None, torch.float32)
    assert out.item() == 1.0


def test_empty():
    x, data, scale = problem(Draw(0), 3, 5, 64, torch.bfloat16)
    assert mxfp4_linear(x[:0], data, scale, None, torch.float32).shape == (0, 5)
    assert mxfp4_linear(x, data[:0], scale[:0], None, torch.float32).shape == (3, 0)
    with checked():
        nothing = mxfp4_linear(x[:, :0], data[:, :0], scale[:, :0], torch.ones(5), torch.float32)
    assert torch.equal(nothing, torch.ones(3, 5))
