"""The C++ quantizer equals the definition on every instruction set: all 16-bit inputs, all ties,
random
fp32 bit patterns, ragged blocks, strides; and properties that hold for any input."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic
from moesaic.backends import cpu
from moesaic.formats import (
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    FP8_E5M2_ROW,
    FP8_ROW,
    FP8_TENSOR,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    PRESETS,
    QuantFormat,
    element_values,
)
from moesaic.reference import quant as reference
from moesaic.testing.metrics import same_bits

pytestmark = pytest.mark.skipif(cpu.extension is None, reason="no C++ extension in this install")
ISAS = cpu.extension.variants() if cpu.extension is not None else []
RULES = ("floor", "rceil", "even", "ceil")
ELEMENTS = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e2m1", "e2m3", "e3m2", "int8")
KERNEL_FORMATS = [f for f in PRESETS.values() if not f.four_over_six]


def agree(x, format, **kwargs):
    """On every instruction set, codes, scales and decoded values are those of the definition."""
    want = reference.quantize(x, format, **kwargs)
    values = {t: reference.dequantize(want, t) for t in (torch.float32, torch.bfloat16)}
    try:
        for isa in ISAS:
            cpu.extension.set_isa(isa)
            got = moesaic.quantize(x, format, backend="cpu", **kwargs)
            same_bits(f"{isa} {format} data", got.data, want.data)
            same_bits(f"{isa} {format} scale", got.scale, want.scale)
            assert (got.global_scale is None) == (want.global_scale is None)
            if want.global_scale is not None:
                same_bits(f"{isa} {format} global scale", got.global_scale, want.global_scale)
            for dtype, decoded in values.items():
                same_bits(f"{isa} {format}", moesaic.dequantize(got, dtype, backend="cpu"), decoded)
    finally:
        cpu.extension.set_isa("auto")


def all_16_bit(dtype):
    """Every bit pattern, in an order that mixes magnitudes within a block."""
    order = torch.arange(65536).mul(40503) % 65536
    return order.to(torch.int32).to(torch.int16).view(dtype)


def every_tie(element):
    """All codes, all midpoints of codes, and their fp32 neighbours."""
    values = element_values(element)
    values = values[values.isfinite()].sort().values
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2])
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    return torch.cat([exact, exact.nextafter(up), exact.nextafter(down)])


def random_bits(n, seed):
    """fp32 values of random bit patterns: every exponent, subnormals, Inf and NaN."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=g).int().view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_16_bit_input_under_a_given_scale(element, dtype):
    format = QuantFormat(element, (1, 16), "fp32")
    x = all_16_bit(dtype).reshape(64, 1024)
    for scale in (1.0, 0.37):
        agree(x, format, scale=torch.full((1, 1), scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", [MXFP4, FP8_ROW, FP8_BLOCK_1X128, MXFP8, NVFP4, INT8], ids=str)
def test_every_16_bit_input_as_its_own_row(format, dtype):
    """Alone in a block the value also decides the scale."""
    agree(all_16_bit(dtype)[:, None], format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", KERNEL_FORMATS, ids=str)
def test_every_16_bit_input_among_others(format, dtype):
    x = all_16_bit(dtype).reshape(512, 128)
    agree(torch.where(x.isfinite(), x, torch.ones_like(x)), format)


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_tie(element):
    x = every_tie(element)[None]
    for step in (1.0, 2.0**-60, 0.1):
        agree(x * step, QuantFormat(element, (1, -1), "fp32"), scale=torch.full((1, 1), step))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "MXFP6_E2M3", "MXFP6_E3M2", "MXINT8"])
def test_every_boundary_of_the_scale_rules(name, rule):
    format = replace(PRESETS[name], scale_rule=rule)
    top = format.max / 2.0**format.emax
    near = torch.tensor([1.0, top, 2 - 2.0 ** -(format.element_type.mantissa_bits + 1), 1.999])
    amax = (near.double()[:, None] * torch.arange(-149.0, 128).double().exp2()).float().flatten()
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    amax = torch.cat([amax, amax.nextafter(up), amax.nextafter(down)])
    x = amax[:, None] * torch.tensor([1.0, -0.43, 0.09, 0.0])
    agree(x, format)
    agree(x, replace(format, element=format.element, scale="fp32") if name != "MXINT8" else format)


@pytest.mark.parametrize("format", KERNEL_FORMATS, ids=str)
def test_random_bit_patterns(format, seeded):
    agree(random_bits(96 * 160, seeded).reshape(96, 160), format)


@pytest.mark.parametrize(
    "format",
    [
        *KERNEL_FORMATS,
        replace(NVFP4, global_scale=False),
        replace(NVFP4, block=(16, 16)),
        replace(FP8_BLOCK_128X128, block=(3, 5)),
        replace(FP8_BLOCK_128X128, block=(-1, 7)),
        replace(FP8_TENSOR, element="int8"),
        replace(FP8_TENSOR, scale_rule="rceil"),
        QuantFormat("e2m1", (-1, -1), "e8m0", scale_rule="even"),
    ],
    ids=str,
)
def test_ragged_shapes_and_strides(format):
    base = torch.randn(5, 300, 300) * torch.randn(5, 300, 1).mul(4).exp2()
    base[1, 3], base[2, :, 5] = float("nan"), 0
    views = [base[:, :n, 1 : 1 + k] for n, k in ((1, 1), (2, 15), (3, 31), (17, 33), (130, 257))]
    views += [base[0, :9, :65], base[:, :6, :9].transpose(0, 1), base[3, 7, :77], base[:, :4, :0]]
    views += [base[:, :0, :64], base.unflatten(1, (3, 100))[:, :, :7, :40], base[0].t()[:9, :70]]
    for x in views:
        agree(x, format)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("format", [MXFP4, FP8_E5M2_ROW, FP8_BLOCK_128X128, NVFP4], ids=str)
def test_threads_and_neighbours_change_nothing(format, isa_name):
    cpu.extension.set_isa(isa_name)
    x = torch.randn(300, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(moesaic.quantize(x, format, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
        cpu.extension.set_isa("auto")
    for other in results[1:]:
        same_bits("data", other.data, results[0].data)
        same_bits("scale", other.scale, results[0].scale)


def test_kernels_write_all_of_their_output_and_nothing_else():
    """Outputs poisoned and fenced by guard bytes: every byte inside is written, none outside."""
    from moesaic.backends.cpu import quant as rows

    for format, n, k in ((MXFP4, 5, 33), (FP8_ROW, 7, 19), (FP8_BLOCK_1X128, 3, 130)):
        x = torch.randn(n, k)
        want = reference.quantize(x, format)
        for poison in (0x00, 0xFF):
            size, scale_size = want.data.nbytes, want.scale.nbytes
            data = torch.full((64 + size + 64,), poison, dtype=torch.uint8)
            scale = torch.full((64 + scale_size + 64,), poison, dtype=torch.uint8)
            cpu.extension.quantize(
                rows._block_format(format), x.data_ptr(), 0, 1, n, k, 0, k, False, 0.0, 3e38,
                0, 0, 0, data.data_ptr() + 64, scale.data_ptr() + 64, 2,
            )  # fmt: skip
            for got, expected in ((data, want.data), (scale, want.scale)):
                assert torch.equal(got[64:-64], expected.contiguous().view(torch.uint8).flatten())
                assert (got[:64] == poison).all() and (got[-64:] == poison).all()


FORMATS = st.builds(
    lambda element, rows, cols, scale: QuantFormat(
        element, (rows, cols), scale, scale_rule="exact" if scale != "e8m0" else "rceil"
    ),
    st.sampled_from(ELEMENTS),
    st.sampled_from([1, 2, 5, -1]),
    st.sampled_from([2, 4, 6, 16, 32, 34, -1]),
    st.sampled_from(["fp32", "e8m0", "e4m3"]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    format=FORMATS,
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 70)),
    seed=st.integers(0, 2**31),
    wild=st.booleans(),
)
def test_any_format_and_shape(format, shape, seed, wild):
    count = shape[0] * shape[1] * shape[2]
    x = random_bits(count, seed) if wild else random_bits(count, seed).nan_to_num().clamp(-9, 9)
    agree(x.reshape(shape), format)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(PRESETS)), seed=st.integers(0, 2**31), power=st.integers(-40, 40)
)
def test_properties_of_quantization(name, seed, power):
    """Negation flips signs only; powers of two move into scales; a step bounds the error."""
    format = PRESETS[name]
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(seed))
    q = moesaic.quantize(x, format)
    values = moesaic.dequantize(q)
    assert torch.equal(moesaic.dequantize(moesaic.quantize(-x, format)), -values)
    scaled = moesaic.dequantize(moesaic.quantize(x * 2.0**power, format))
    assert torch.equal(scaled, values * 2.0**power)
    peak = x.abs().max()
    step = 2.0 ** -(format.element_type.mantissa_bits + 1) if format.element != "int8" else 2.0**-6
    assert ((values - x).abs() <= 2 * step * peak).all()
