"""The C++ matmul: every code decodes exactly, packing loses nothing, and the order of additions is
the one that csrc/cpu/matmul/gemm.h promises, on every instruction set."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import moesaic
from moesaic.backends import cpu
from moesaic.formats import (
    FP8_E4M3FNUZ_ROW,
    FP8_E5M2_ROW,
    FP8_ROW,
    FP8_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    PRESETS,
    QuantFormat,
    QuantTensor,
    e8m0_values,
    element_values,
)

if cpu.extension is None:
    pytest.skip("no C++ extension in this install", allow_module_level=True)
ISAS = cpu.extension.variants()
SERVED = {n: f for n, f in PRESETS.items() if f.element not in ("e2m3", "e3m2", "e5m2fnuz")}


def linear(x, packed, **kwargs):
    return moesaic.quant_linear(x, packed, backend="cpu", **kwargs)


def pack(weight):
    return moesaic.pack_weight(weight, backend="cpu")


def codes_as_weight(format, codes):
    """A QuantTensor of the given codes, int64 [N, K], all scales 1."""
    shape = tuple(codes.shape)
    data = codes.to(torch.uint8)
    if format.element == "e2m1":
        data = data[:, 0::2] | (data[:, 1::2] << 4)
    one = torch.ones(format.scale_shape(shape))
    scale = torch.full_like(one, 127, dtype=torch.uint8) if format.scale == "e8m0" else one
    global_scale = torch.tensor(1.0) if format.global_scale else None
    data = data.view(format.data_dtype)
    return QuantTensor(data, scale.to(format.scale_dtype), global_scale, format, shape)


def random_weight(format, shape):
    """Any bit patterns, NaN codes among them."""
    data = torch.randint(0, 256, format.data_shape(shape), dtype=torch.uint8)
    if format.element == "e2m1" and shape[-1] % 2:
        data[..., -1] &= 15
    scale = torch.rand(format.scale_shape(shape))
    if format.scale == "e8m0":
        scale = torch.randint(0, 256, scale.shape, dtype=torch.uint8)
    global_scale = torch.rand(()) if format.global_scale else None
    scale = scale.to(format.scale_dtype)
    return QuantTensor(data.view(format.data_dtype), scale, global_scale, format, tuple(shape))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(
    "format", [MXFP4, FP8_ROW, FP8_E5M2_ROW, FP8_E4M3FNUZ_ROW, PRESETS["INT8"]], ids=str
)
def test_every_code_decodes_exactly(format, isa):
    values = format.values()
    if format.element != "int8":  # 0 * NaN and 0 * Inf would hide the other codes of a row
        values = torch.where(values.isfinite(), values, 0.0)
    codes = torch.arange(1024) % values.numel()
    codes = torch.where(format.values()[codes].isfinite(), codes, 0).view(16, 64)
    packed = pack(codes_as_weight(format, codes))
    for rows in (1, 64):  # decoded in registers, decoded to L1
        x = torch.eye(64)[:rows]
        assert torch.equal(linear(x, packed), values[codes].T[:rows])
    for k in range(64):
        assert torch.equal(linear(torch.eye(64)[k : k + 1], packed)[0], values[codes][:, k])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("block", [(1, 32), (16, 32)], ids=str)
def test_every_power_of_two_scale_is_exact(block, isa):
    format = replace(MXFP4, block=block)
    weight = codes_as_weight(format, torch.full((256 * block[0], 32), 2))  # 2 is the code of 1.0
    weight = replace(weight, scale=torch.arange(256, dtype=torch.uint8)[:, None])
    want = e8m0_values().repeat_interleave(block[0])
    for rows in (1, 7):
        got = linear(torch.eye(32)[:rows], pack(weight))
        assert torch.equal(got.nan_to_num(-1.0), want.expand(rows, -1).nan_to_num(-1.0))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_e4m3_scale_is_exact(isa):
    codes = torch.full((256, 16), 2)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = replace(codes_as_weight(NVFP4, codes), scale=every[:, None])
    for rows in (1, 7):
        got = linear(torch.eye(16)[:rows], pack(weight))
        want = element_values("e4m3fn").expand(rows, -1)
        assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("format", [FP8_ROW, FP8_TENSOR, FP8_E4M3FNUZ_ROW, MXFP8], ids=str)
def test_a_nan_code_reaches_its_output_and_no_other(format, isa):
    codes = torch.full((37, 64), 8)
    codes[5, 3] = codes[36, 63] = 0x80 if "fnuz" in format.element else 0xFF
    packed = pack(codes_as_weight(format, codes))
    for rows in (1, 9):
        got = linear(torch.zeros(rows, 64), packed)
        assert got.isnan().nonzero()[:, 1].unique().tolist() == [5, 36]


@pytest.mark.parametrize("shape", [(37, 70), (3, 21, 33), (2, 2, 16, 128), (1, 1), (0, 8), (5, 0)])
@pytest.mark.parametrize("format", SERVED.values(), ids=SERVED)
def test_unpacking_restores_every_bit(format, shape):
    weight = random_weight(format, shape)
    back = moesaic.unpack_weight(pack(weight))
    assert (back.format, back.shape) == (format, shape)
    for got, want in ((back.data, weight.data), (back.scale, weight.scale)):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert (back.global_scale is None) == (weight.global_scale is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 70), (2, 17, 9), (0, 4)])
def test_dense_weights_survive_packing(dtype, shape):
    weight = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype)[..., 0]
    back = moesaic.unpack_weight(pack(weight))
    assert back.shape == weight.shape
    assert torch.equal(back.contiguous().view(torch.uint8), weight.contiguous().view(torch.uint8))


def test_the_layout_and_its_bits_do_not_depend_on_the_instruction_set():
    weight = random_weight(MXFP4, (40, 96))
    packed = pack(weight)
    x = torch.randn(8, 96)
    results = []
    for isa in ISAS:
        cpu.extension.set_isa(isa)
        again = pack(weight)
        assert torch.equal(packed.data, again.data) and torch.equal(packed.scale, again.scale)
        results.append(linear(x, packed))
    cpu.extension.set_isa("auto")
    assert all(torch.equal(r.nan_to_num(), results[0].nan_to_num()) for r in results)


@pytest.mark.parametrize(
    "name", ["MXFP4", "NVFP4", "MXFP8", "FP8_BLOCK_1X128", "FP8_BLOCK_128X128"]
)
def test_packed_size_is_the_formats(name):
    format = PRESETS[name]
    packed = pack(random_weight(format, (256, 512)))
    bits = 8 * (packed.nbytes - (packed.poison.nbytes if packed.poison is not None else 0))
    assert bits / (256 * 512) <= 1.05 * format.bits_per_value


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])
def test_the_order_of_additions_is_the_documented_one(rows, isa):
    n, k, block = 19, 150, 32
    weight = moesaic.quantize(torch.randn(n, k), MXFP4, backend="reference")
    x = torch.randn(rows, k).bfloat16()
    codes = torch.stack([weight.data & 15, weight.data >> 4], -1).flatten(-2)[:, :k]
    values = element_values("e2m1")[codes.long()].double().numpy()
    scales = e8m0_values()[weight.scale.long()].double().numpy()
    wide = x.double().numpy()
    acc = np.zeros((rows, n), np.float32)
    # Products of bf16 and E2M1 are exact in fp64, and so are the sums before rounding to fp32.
    for b in range(scales.shape[1]):
        p = np.zeros((rows, n), np.float32)
        for i in range(b * block, min((b + 1) * block, k)):
            p = (wide[:, i, None] * values[:, i] + p).astype(np.float32)
        acc = (p.astype(np.float64) * scales[:, b] + acc).astype(np.float32)
    assert torch.equal(linear(x, pack(weight), out_dtype=torch.float32), torch.from_numpy(acc))


@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "leading"])
def test_activations_of_any_strides(view):
    packed = pack(moesaic.quantize(torch.randn(24, 64), MXFP4, backend="reference"))
    x = {
        "rows": torch.randn(12, 64)[::2],
        "columns": torch.randn(6, 128)[:, ::2],
        "transposed": torch.randn(64, 6).T,
        "leading": torch.randn(2, 3, 64).transpose(0, 1),
    }[view]
    got = linear(x, packed)
    assert torch.equal(got, linear(x.contiguous(), packed)) and got.shape == (*x.shape[:-1], 24)


def test_quantized_activations_are_the_definitions():
    packed = pack(moesaic.quantize(torch.randn(24, 96), MXFP4, backend="reference"))
    x = torch.randn(5, 96)
    kept = moesaic.fake_quantize(x, MXFP8, backend="reference")
    assert torch.equal(linear(x, packed, activation=MXFP8), linear(kept, packed))


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (PRESETS["MXFP6_E2M3"], "no kernel decodes e2m3 weights"),
        (QuantFormat("e4m3fn", (1, 6), "fp32"), "blocks of 6 columns"),
        (QuantFormat("e4m3fn", (8, 128), "fp32"), "blocks of 8 rows"),
    ],
)
def test_what_is_not_packed_is_said(format, reason):
    weight = random_weight(format, (16, 24))
    with pytest.raises(NotImplementedError, match=reason):
        pack(weight)
    assert moesaic.pack_weight(weight).layout == "plain"  # the reference takes it


def test_fp64_goes_to_the_reference():
    packed = pack(torch.randn(8, 16))
    with pytest.raises(NotImplementedError, match="float64"):
        linear(torch.randn(2, 16).double(), packed)
    with pytest.raises(NotImplementedError, match="packed as 'plain'"):
        linear(torch.randn(2, 16), moesaic.pack_weight(torch.randn(8, 16), backend="reference"))
