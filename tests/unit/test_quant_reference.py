"""The quantizer against independent ones: an exact oracle, torch and ml_dtypes casts,
compressed-tensors; and the published table of special cases."""

import itertools
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

from moesaic import formats
from moesaic.formats import (
    FP8_BLOCK_128X128,
    FP8_ROW,
    FP8_TENSOR,
    INT8,
    MXFP4,
    MXFP8,
    MXINT8,
    NVFP4,
    NVFP4_4OVER6,
    PRESETS,
    QuantFormat,
    element_type,
    element_values,
)
from moesaic.reference._philox import philox_u32
from moesaic.reference.quant import (
    dequantize,
    fake_quantize,
    quantization_error,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)

from .quant_oracle import MANTISSA, MAX, ML_DTYPES, power_of_two, quantize_block

NAN, INF = math.nan, math.inf
DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def codes_of(q):
    """Codes as uint8 [..., N, K], unpacked by hand."""
    data = q.data.view(torch.uint8).numpy()
    if q.format.element == "e2m1":
        out = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.uint8)
        out[..., ::2], out[..., 1::2] = data & 15, data >> 4
        assert (out[..., q.shape[-1] :] == 0).all()
        return out[..., : q.shape[-1]]
    return data


def scales_of(q):
    return (q.scale if q.scale.dtype == torch.float32 else q.scale.view(torch.uint8)).numpy()


def unit_scaled(element):
    """A format whose static scale 1 makes quantization the bare cast."""
    return QuantFormat(element, (1, -1), "fp32"), torch.ones(1, 1)


def around(values):
    """Each fp32 value with its two neighbours."""
    v = torch.as_tensor(values, dtype=torch.float32)
    return torch.cat([v, v.nextafter(torch.tensor(INF)), v.nextafter(torch.tensor(-INF))])


@pytest.mark.parametrize("element", MAX)
def test_every_code_tie_and_neighbour_rounds_to_nearest_even(element):
    values = element_values(element)
    values = values[values.isfinite()].sort().values
    ties = (values[1:].double() + values[:-1].double()) / 2
    x = around(torch.cat([values.double(), ties]))
    x = x[x.abs() <= MAX[element]]
    format, one = unit_scaled(element)
    got = codes_of(quantize(x, format, scale=one))[0]
    if element == "int8":
        want = np.rint(x.numpy()).astype(np.int8).view(np.uint8)
    else:
        want = x.numpy().astype(ML_DTYPES[element]).view(np.uint8)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("element", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_inputs_match_the_torch_cast(element, dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    format, one = unit_scaled(element)
    got = quantize(x, format, scale=one).data[0].view(torch.uint8)
    clamped = x.float().clamp(-MAX[element], MAX[element])
    want = clamped.to(element_type(element).dtype).view(torch.uint8)
    want[x.isnan()] = element_type(element).nan_code
    assert torch.equal(got, want)


def test_e2m1_ties_by_hand():
    x = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.2500001, 0.7499999, 5.0000005, 1e9]
    format, one = unit_scaled("e2m1")
    q = quantize(torch.tensor(x + [-v for v in x]), format, scale=one)
    want = [0, 1, 1, 2, 2, 4, 4, 0.5, 0.5, 6, 6]
    assert dequantize(q)[0].tolist() == want + [-v for v in want]


@pytest.mark.parametrize("rule", ["floor", "rceil", "even", "ceil"])
@pytest.mark.parametrize(
    "name", ["MXFP8", "MXFP8_E5M2", "MXFP6_E2M3", "MXFP6_E3M2", "MXFP4", "MXINT8"]
)
def test_power_of_two_rules_at_every_boundary(name, rule):
    format = replace(PRESETS[name], scale_rule=rule)
    element = format.element_type
    top = element.max * format.code_unit
    halfway = 2 - 2.0 ** -(element.mantissa_bits + 1)  # where "even" carries into the exponent
    mantissas = {1.0, halfway, top / 2.0**format.emax}
    amax = around(
        [m * 2.0**k for m in mantissas for k in range(-126, 128) if m * 2.0**k < 2.0**128]
    )
    amax = amax[amax.isfinite() & (amax >= 2.0**-126)]
    q = quantize(amax[:, None], format)
    exact_top = Fraction(top)
    want = [power_of_two(a, exact_top, element.mantissa_bits, rule) for a in amax.tolist()]
    np.testing.assert_array_equal(q.scale.numpy()[:, 0], np.clip(np.array(want) + 127, 0, 254))
    as_fp32 = quantize(amax[:, None], replace(format, scale="fp32")) if name != "MXINT8" else None
    if as_fp32 is not None:
        assert torch.equal(as_fp32.scale, formats.e8m0_values()[q.scale.long()])
        assert torch.equal(as_fp32.data.view(torch.uint8), q.data.view(torch.uint8))


def test_rceil_never_clips_and_is_the_smallest_that_does_not():
    x = torch.randn(4096, 1).exp2() ** 9
    for name in ("MXFP8", "MXFP4", "MXINT8"):
        q = quantize(x, replace(PRESETS[name], scale_rule="rceil"))
        limit = formats.e8m0_values()[q.scale.long()] * q.format.max
        assert (x <= limit).all() and (x > limit / 2).all()


def test_subnormal_and_smallest_blocks_have_the_smallest_scale():
    tiny = torch.tensor([[2.0**-149], [2.0**-127], [1e-40]])
    for rule in ("floor", "rceil", "even", "ceil"):
        assert quantize(tiny, replace(MXFP4, scale_rule=rule)).scale.tolist() == [[0], [0], [0]]
    assert (quantize(tiny, FP8_ROW).scale == 2.0**-126).all()


def test_eps_and_upper_bound_of_amax():
    x = torch.tensor([[1e-6, 0.0], [3.0, -5.0]])
    q = quantize(x, FP8_ROW, eps=1e-4, amax_ub=4.0)
    want = torch.tensor([[1e-4], [4.0]]) / 448
    assert torch.equal(q.scale, want)
    assert dequantize(q)[1, 1] == -(want[1] * 448)


MESSY = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-42, -3e38, 1e-8])


def matrix(shape, seed):
    """Magnitudes over many binades, whole zero blocks, and a sprinkle of specials."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.randn(shape, generator=g).mul(3).exp2()
    x[..., 0, :] = 0
    x[..., 1, :32] = -0.0
    where = torch.rand(shape, generator=g) < 0.004
    pick = torch.randint(len(MESSY), shape, generator=g)
    return torch.where(where, MESSY[pick], x)


ALL_FORMATS = [
    *PRESETS.values(),
    replace(MXFP4, scale_rule="floor"),
    replace(MXFP4, scale_rule="rceil"),
    replace(MXFP8, scale_rule="even"),
    replace(FP8_BLOCK_128X128, block=(16, 16)),
    replace(FP8_BLOCK_128X128, scale_rule="rceil", block=(3, 5)),
    replace(NVFP4, global_scale=False),
    replace(NVFP4, block=(16, 16)),
    replace(NVFP4, element="e2m3"),
    QuantFormat("e5m2fnuz", (1, -1), "fp32"),
    QuantFormat("e4m3fnuz", (1, 32), "e8m0", scale_rule="rceil"),
]


@pytest.mark.parametrize("shape", [(2, 5, 67), (129, 37)], ids=str)
@pytest.mark.parametrize("format", ALL_FORMATS, ids=str)
def test_against_the_exact_oracle(format, shape):
    x = matrix(shape, seed=len(str(format)) + shape[-1])
    q = quantize(x, format)
    codes, scales = codes_of(q), scales_of(q)
    rows, cols = (n if b == -1 else b for n, b in zip(shape[-2:], format.block, strict=True))
    for index in itertools.product(*map(range, scales.shape)):
        *batch, i, j = index
        at = (*batch, slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols))
        block = x.numpy()[at]
        top = None if q.global_scale is None else q.global_scale.numpy()[(*batch, 0, 0)]
        if format.four_over_six:
            candidates = [quantize_block(block, format, top, divisor=d) for d in (6, 4)]
            assert any(_same(c, scales[index], codes[at]) for c in candidates), index
        else:
            want = quantize_block(block, format, top)
            assert _same(want, scales[index], codes[at]), (index, want, scales[index], codes[at])


def _same(want, scale, codes):
    stored, want_codes = want
    return np.array_equal(stored, scale, equal_nan=True) and np.array_equal(want_codes, codes)


def test_four_over_six_keeps_the_smaller_error():
    x = torch.randn(64, 160)
    q = quantize(x, NVFP4_4OVER6)
    error = (dequantize(q, torch.float64) - x).square().unflatten(-1, (10, 16)).sum(-1)
    candidates = []
    for divisor in (6, 4):
        out = torch.empty(64, 10, dtype=torch.float64)
        for i, j in itertools.product(range(64), range(10)):
            block = x.numpy()[i, 16 * j : 16 * j + 16]
            stored, codes = quantize_block(block, NVFP4, q.global_scale.numpy()[0, 0], divisor)
            scale = np.uint8(stored).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            values = element_values("e2m1").numpy()[codes] * scale * np.float64(q.global_scale)
            out[i, j] = ((values - block) ** 2).sum()
        candidates.append(out)
    torch.testing.assert_close(error, torch.minimum(*candidates), rtol=1e-12, atol=0)
    assert (candidates[1] < candidates[0]).any() and (candidates[1] > candidates[0]).any()


def test_global_scale_per_matrix_and_per_row():
    x = torch.randn(3, 4, 32)
    x[1, 2] = 0
    per_matrix = quantize(x, NVFP4)
    assert torch.equal(per_matrix.global_scale, x.abs().amax((1, 2), keepdim=True) / 2688)
    per_row = quantize(x, NVFP4, global_scale="row")
    want = x.abs().amax(-1, keepdim=True) / 2688
    want[1, 2] = 1
    assert torch.equal(per_row.global_scale, want)
    assert torch.equal(per_row.scale.float().amax(-1)[0], torch.full((4,), 448.0))
    one_row = quantize(x[2, 3:], NVFP4, global_scale=per_row.global_scale[2, 3])
    assert torch.equal(one_row.data, per_row.data[2, 3:])
    assert torch.equal(one_row.scale.view(torch.uint8), per_row.scale[2, 3:].view(torch.uint8))


@pytest.mark.parametrize("format", ALL_FORMATS, ids=str)
def test_quantizing_again_with_the_same_scales_changes_nothing(format):
    x = torch.randn(34, 70)
    q = quantize(x, format)
    again = quantize(
        dequantize(q, torch.float32), format, scale=q.scale, global_scale=q.global_scale
    )
    assert torch.equal(again.data.view(torch.uint8), q.data.view(torch.uint8))


@pytest.mark.parametrize("format", list(PRESETS.values()), ids=str)
@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 0), (2, 0, 5), (1, 1)], ids=str)
def test_empty_and_tiny(format, shape):
    q = quantize(torch.zeros(shape), format)
    assert q.data.shape == format.data_shape(shape) and q.scale.shape == format.scale_shape(shape)
    assert dequantize(q).shape == shape


def test_one_dimension_is_one_row():
    q = quantize(torch.arange(5.0), MXFP4)
    assert q.shape == (1, 5) and q.data.shape == (1, 3)
    assert torch.equal(q.data, quantize(torch.arange(5.0)[None], MXFP4).data)


def test_input_dtype_matters_by_its_values_only():
    x = torch.randn(8, 64).bfloat16()
    for dtype in (torch.float32, torch.float64):
        a, b = quantize(x, MXFP4), quantize(x.to(dtype), MXFP4)
        assert torch.equal(a.data, b.data) and torch.equal(a.scale, b.scale)


def test_decoding_is_one_product_rounded_once():
    x = torch.randn(16, 64)
    for format in PRESETS.values():
        q = quantize(x, format)
        exact = dequantize(q, torch.float64)
        single = dequantize(q)
        assert (
            torch.equal(single.double(), exact)
            or format.scale == "fp32"
            or q.global_scale is not None
        )
        assert (single.double() - exact).abs().max() <= 2.0**-24 * exact.abs().max()
        assert torch.equal(dequantize(q, torch.bfloat16), single.bfloat16())


def test_e8m0_zero_is_a_subnormal_and_255_is_nan():
    one = torch.full((1, 4), 0x22, dtype=torch.uint8)
    for code, want in ((0, 2.0**-127), (254, 2.0**127)):
        scale = torch.tensor([[code]], dtype=torch.uint8)
        assert (dequantize(formats.QuantTensor(one, scale, None, MXFP4, (1, 8))) == want).all()
    nan = torch.tensor([[255]], dtype=torch.uint8)
    assert dequantize(formats.QuantTensor(one, nan, None, MXFP4, (1, 8))).isnan().all()


def test_mxfp4_matches_compressed_tensors():
    x = torch.randn(64, 256) * torch.randn(64, 1).exp2()
    q = quantize(x, MXFP4)
    amax = x.abs().unflatten(-1, (8, 32)).amax(-1)
    exponents = generate_mx_scales(amax)
    assert torch.equal(q.scale, exponents.to(torch.uint8))
    scaled = x / torch.exp2(exponents - 127).repeat_interleave(32, -1)
    assert torch.equal(q.data, pack_fp4_to_uint8(cast_to_fp4(scaled)))


def test_nvfp4_matches_compressed_tensors():
    x = torch.randn(64, 256)
    x[5, 9] = 42.0  # amax / 2688 is a power of two: both conventions of the global scale are exact
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    divisor = generate_gparam(x.min(), x.max())
    blocks = x.unflatten(-1, (16, 16))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor)
    q = quantize(x, NVFP4)
    assert q.global_scale.item() == 1 / divisor.item() == 2.0**-6
    assert torch.equal(q.scale.float(), scale.to(torch.float8_e4m3fn).float())
    zero = torch.zeros_like(scale)
    rounded = scale.to(torch.float8_e4m3fn).float()
    values = ct_quantize(x, rounded, zero, args, global_scale=divisor)
    assert torch.equal(q.data, pack_fp4_to_uint8(values.float()))


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_fp8_matches_compressed_tensors(strategy):
    x = torch.randn(32, 96)
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    low, high = (
        (x.amin(-1, True), x.amax(-1, True)) if strategy == "channel" else (x.min(), x.max())
    )
    scale, zero = calculate_qparams(low, high, args)
    q = quantize(x, FP8_ROW if strategy == "channel" else FP8_TENSOR, scale=scale.reshape(-1, 1))
    want = ct_quantize(x, scale, zero, args, dtype=torch.float8_e4m3fn)
    assert torch.equal(q.data.view(torch.uint8), want.view(torch.uint8))
    dynamic = quantize(x, q.format)
    torch.testing.assert_close(dynamic.scale, scale.reshape(-1, 1), rtol=2.0**-22, atol=0)


def test_philox_against_whole_integers():
    """Random123's published first word for key and counter zero; the rounds in Python ints."""
    assert philox_u32(0, torch.tensor([0])).tolist() == [0x6627E8D5]

    def word(seed, index):
        c, k = [index & M, index >> 32, 0, 0], [seed & M, (seed >> 32) & M]
        for _ in range(10):
            p0, p2 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(p2 >> 32) ^ c[1] ^ k[0], p2 & M, (p0 >> 32) ^ c[3] ^ k[1], p0 & M]
            k = [(k[0] + 0x9E3779B9) & M, (k[1] + 0xBB67AE85) & M]
        return c[0]

    M = 2**32 - 1
    index = [0, 1, 2, 77, 2**31, 2**32 - 1, 2**32 + 5, 2**40]
    for seed in (0, 1, 2**31, 2**63 - 1, -1):
        assert philox_u32(seed, torch.tensor(index)).tolist() == [word(seed, i) for i in index]


@pytest.mark.parametrize("name", ["FP8_ROW", "MXFP4", "INT8", "FP8_E5M2_ROW"])
def test_stochastic_rounding_is_unbiased_and_stays_between_neighbours(name):
    format = replace(PRESETS[name], rounding="stochastic")
    values = element_values(format.element)
    values = values[values.isfinite() & (values >= 0)].unique()[:20]
    count = 40_000
    scale = torch.tensor([[127]], dtype=torch.uint8) if format.scale == "e8m0" else torch.ones(1, 1)
    for low, high in zip(values[:-1].tolist(), values[1:].tolist(), strict=True):
        for fraction in (0.25, 0.9):
            x = torch.full((1, count), -(low + fraction * (high - low)))
            got = -dequantize(quantize(x, format, scale=scale, seed=7))
            assert ((got == low) | (got == high)).all()
            share = (got == high).double().mean().item()
            assert abs(share - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / count)


def test_stochastic_rounding_keeps_codes_and_repeats():
    format = replace(MXFP4, rounding="stochastic")
    x = torch.randn(40, 64)
    a, b, c = (quantize(x, format, seed=s) for s in (3, 3, 4))
    assert torch.equal(a.data, b.data) and not torch.equal(a.data, c.data)
    assert torch.equal(quantize(dequantize(a), format, scale=a.scale, seed=9).data, a.data)
    with pytest.raises(ValueError, match="quantize: seed: expected an int for stochastic rounding"):
        quantize(x, format)


def test_fake_quantize_value_and_gradients():
    x = torch.tensor([0.3, -2.0, 7.0, 100.0], requires_grad=True)
    scale = torch.tensor([[127]], dtype=torch.uint8)
    y = fake_quantize(x, MXFP4, scale=scale)
    assert torch.equal(y, torch.tensor([0.5, -2.0, 6.0, 6.0]))
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1, 2, 3, 4]
    x.grad = None
    fake_quantize(x, MXFP4, scale=scale, clip_gradient=True).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_clipping_ignores_the_rounding_of_an_exact_scale():
    x = torch.randn(50, 300, requires_grad=True)
    fake_quantize(x, FP8_ROW, clip_gradient=True).sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_quantize(dtype):
    x, residual = torch.randn(2, 9, 96, dtype=dtype), torch.randn(2, 9, 96, dtype=dtype)
    weight = torch.randn(96, dtype=dtype)
    q, hidden, norm = rms_norm_quantize(
        x, weight, FP8_ROW, norm_eps=1e-5, residual=residual, return_norm=True
    )
    assert torch.equal(hidden, x + residual)
    want = torch.nn.functional.rms_norm(hidden.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(norm.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(q.data.view(torch.uint8), quantize(norm, FP8_ROW).data.view(torch.uint8))
    alone = rms_norm_quantize(hidden, weight, FP8_ROW, norm_eps=1e-5)
    assert torch.equal(alone.data.view(torch.uint8), q.data.view(torch.uint8))
    assert len(rms_norm_quantize(x, weight, FP8_ROW, residual=residual)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_silu_mul_quantize(dtype):
    x = 4 * torch.randn(11, 2 * 40, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    want = quantize((torch.nn.functional.silu(gate) * up).to(dtype), INT8)
    got = silu_mul_quantize(x, INT8)
    assert got.shape == (11, 40)
    tolerance = {torch.bfloat16: 0, torch.float32: 1, torch.float64: 1}[dtype]
    assert (got.data.int() - want.data.int()).abs().max() <= tolerance
    both = torch.stack((gate, up), -1).flatten(-2).to(dtype)
    again = silu_mul_quantize(both, INT8, interleaved=True)
    assert torch.equal(again.data, got.data)


def test_swigluoai_is_the_activation_of_gpt_oss():
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    x = 6 * torch.randn(17, 2 * 24, dtype=torch.float64)
    experts = gpt_oss.GptOssExperts.__new__(gpt_oss.GptOssExperts)
    torch.nn.Module.__init__(experts)
    experts.alpha, experts.limit = 1.702, 7.0
    want = experts._apply_gate(x)
    q = silu_mul_quantize(x, FP8_ROW, activation="swigluoai", interleaved=True)
    expected = quantize(want, FP8_ROW)
    assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert not torch.equal(
        q.data.view(torch.uint8),
        silu_mul_quantize(
            x, FP8_ROW, activation="swigluoai", interleaved=True, limit=3.0
        ).data.view(torch.uint8),
    )


def test_quantization_error_by_hand():
    x = torch.tensor([[3.0, 4.0, 100.0, 0.1, NAN]])
    q = quantize(torch.tensor([[3.0, 4.0, 6.0, 0.0, 0.0]]), MXFP4)
    report = quantization_error(x, q)
    assert report["rel_l2"] == pytest.approx(math.sqrt((94**2 + 0.1**2) / (25 + 1e4 + 0.01)))
    assert report["sqnr_db"] == pytest.approx(-20 * math.log10(report["rel_l2"]))
    assert report["max_abs"] == 94 and report["clipped"] == 0.2 and report["flushed"] == 0.2
    assert report["nan"] == 0.0
    assert report["cosine"] == pytest.approx((25 + 600) / math.sqrt((25 + 1e4 + 0.01) * (25 + 36)))
    assert quantization_error(torch.zeros(1, 4), quantize(torch.zeros(4), MXFP4)) == {
        "sqnr_db": INF, "rel_l2": 0.0, "max_abs": 0.0, "cosine": 1.0, "clipped": 0.0,
        "flushed": 0.0, "nan": 0.0,
    }  # fmt: skip
    lossy = quantization_error(torch.tensor([NAN, 1.0]), quantize(torch.tensor([NAN, 1.0]), MXFP4))
    assert lossy["nan"] == 1.0


@pytest.mark.parametrize(
    ("name", "decibel"),
    [("MXFP4", 19.0), ("NVFP4", 20.4), ("NVFP4_4OVER6", 21.2), ("MXFP8", 31.5), ("INT8", 45.4)],
)
def test_signal_to_noise_on_normal_data(name, decibel):
    x = torch.randn(256, 512)
    assert quantization_error(x, quantize(x, PRESETS[name]))["sqnr_db"] == pytest.approx(
        decibel, abs=0.2
    )


def rows(heading, columns):
    table = DOCS.read_text().split(heading)[1]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == columns]


SPECIAL = rows("## Zero blocks", 6)


@pytest.mark.parametrize("row", SPECIAL, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}")
def test_published_special_cases(row):
    case, name, given, data, scale, values = row
    preset, _, rule = name.partition(" ")
    format = replace(PRESETS[preset], scale_rule=rule) if rule else PRESETS[preset]
    options = {"eps": 1e-4} if "eps=1e-4" in case else {}
    if "static scale" in case:
        e8m0 = torch.tensor([[127]], dtype=torch.uint8)
        options["scale"] = e8m0 if format.scale == "e8m0" else torch.ones(1, 1)
    q = quantize(torch.tensor([float(v) for v in given.split()]), format, **options)
    stored = q.scale.item() if format.scale == "fp32" else q.scale.view(torch.uint8).item()
    text = f"{stored:.9g}" if format.scale == "fp32" else f"{stored:02X}"
    if q.global_scale is not None:
        text += f" * {q.global_scale.item():.9g}"
    assert " ".join(f"{b:02X}" for b in q.data.view(torch.uint8).flatten().tolist()) == data
    assert text == scale
    assert " ".join(f"{v:.9g}" for v in dequantize(q).flatten().tolist()) == values


def test_published_presets():
    table = {r[0].strip("`"): r for r in rows("## Presets", 6) if r[0].strip("`") in PRESETS}
    assert table.keys() == PRESETS.keys()
    for name, (_, element, block, scale, rule, size) in table.items():
        format = PRESETS[name]
        shape = {(-1, -1): "matrix", (1, -1): "row"}.get(
            format.block, "{}x{}".format(*format.block)
        )
        assert (element, block) == (format.element, shape)
        assert scale == format.scale + " + fp32 global" * format.global_scale
        assert rule == format.scale_rule + ", 4 over 6" * format.four_over_six
        assert float(size) == pytest.approx(format.bits_per_value, rel=1e-5)


def test_table_covers_the_policies():
    names = " ".join(row[0] for row in SPECIAL)
    for word in ("zero block", "NaN", "Inf", "overflow", "padded", "underflow"):
        assert re.search(word, names)


def test_mantissa_bits_of_the_oracle_are_those_of_the_formats():
    assert {n: element_type(n).mantissa_bits for n in MANTISSA} == MANTISSA
    assert MXINT8.code_unit == 2.0**-6
