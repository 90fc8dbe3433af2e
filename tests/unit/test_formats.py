"""Formats: all codes of all types against ml_dtypes and torch; specs, shapes, messages, pytrees."""

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from moesaic.formats import (
    FP8_BLOCK_128X128,
    FP8_ROW,
    INT8,
    MXFP4,
    MXINT8,
    NVFP4,
    PRESETS,
    PackedWeight,
    QuantFormat,
    QuantTensor,
    e8m0_values,
    element_type,
    element_values,
)

ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "int8": np.int8,
}


def bits(values):
    """fp32 bit patterns, so that signs of zero count; all NaNs as one."""
    values = np.asarray(values, np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_means_what_ml_dtypes_says(name):
    codes = np.arange(1 << element_type(name).bits, dtype=np.uint8)
    want = codes.view(ML_DTYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(bits(element_values(name)), bits(want))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_every_code_means_what_torch_says(name):
    codes = torch.arange(256, dtype=torch.uint8).view(element_type(name).dtype)
    np.testing.assert_array_equal(bits(element_values(name)), bits(codes.float()))


def test_every_e8m0_code_means_what_torch_and_ml_dtypes_say():
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(
        bits(e8m0_values()), bits(codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    )
    np.testing.assert_array_equal(
        bits(e8m0_values()), bits(codes.view(torch.float8_e8m0fnu).float())
    )


@pytest.mark.parametrize("name", ML_DTYPES)
def test_element_facts(name):
    element = element_type(name)
    values = element_values(name)
    finite = values[values.isfinite()]
    # -128 is never written, so that int8 codes are symmetric.
    assert finite.max() == element.max == -max(finite.min(), -element.max)
    assert 2.0**element.emax <= element.max < 2.0 ** (element.emax + 1)
    assert element.nan_code is None or values[element.nan_code].isnan()
    assert values.isnan().any() == (element.nan_code is not None)
    if element.is_float:
        positive = finite[finite > 0].min()
        assert positive == 2.0 ** (element.min_exponent - element.mantissa_bits)


@pytest.mark.parametrize("name", PRESETS)
def test_spec_round_trip(name):
    for rounding in ("rne", "stochastic"):
        format = dataclasses.replace(PRESETS[name], rounding=rounding)
        assert QuantFormat.from_string(str(format)) == format
    assert len({str(f) for f in PRESETS.values()}) == len(PRESETS)


def test_every_valid_combination_round_trips():
    count = 0
    for element, block, (scale, rules), four in itertools.product(
        ML_DTYPES,
        [(-1, -1), (1, -1), (1, 16), (128, 128), (16, 16)],
        [("fp32", ["exact", "rceil"]), ("e8m0", ["floor", "ceil", "even"]), ("e4m3", ["exact"])],
        [False, True],
    ):
        for rule, top in itertools.product(rules, [False, True]):
            if (top and scale != "e4m3") or (four and (element, scale) != ("e2m1", "e4m3")):
                continue
            format = QuantFormat(element, block, scale, top, rule, "rne", four)
            assert QuantFormat.from_string(str(format)) == format
            count += 1
    assert count == 8 * 5 * (2 + 3 + 2) + 5 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e9m9", (1, 32), "e8m0"), "QuantFormat: element: expected one of e4m3fn, .*got 'e9m9'"),
        (
            ("e2m1", (1, 0), "fp32"),
            "QuantFormat: block: expected two positive ints.*got \\(1, 0\\)",
        ),
        (("e2m1", (32,), "fp32"), "QuantFormat: block: expected two positive ints.*got \\(32,\\)"),
        (("e2m1", (1, 32), "bf16"), "QuantFormat: scale: expected one of fp32, e8m0, e4m3"),
        (
            ("e2m1", (1, 32), "e8m0", False, "exact"),
            "QuantFormat: scale_rule: expected one of floor, .* for e8m0 scales, got 'exact'",
        ),
        (
            ("e2m1", (1, 16), "e4m3", True, "floor"),
            "QuantFormat: scale_rule: expected one of exact for e4m3 scales, got 'floor'",
        ),
        (
            ("e2m1", (1, 16), "fp32", False, "exact", "up"),
            "QuantFormat: rounding: expected one of rne, stochastic, got 'up'",
        ),
        (
            ("e2m1", (1, 16), "fp32", True),
            "QuantFormat: global_scale: expected e4m3 block scales, got fp32 scales",
        ),
        (
            ("e2m3", (1, 16), "e4m3", True, "exact", "rne", True),
            "QuantFormat: four_over_six: expected element e2m1 with e4m3 scales, got e2m3",
        ),
    ],
)
def test_impossible_formats_say_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantFormat(*arguments)


@pytest.mark.parametrize("spec", ["", "e2m1", "e2m1:32:e8m0:even:rne", "e2m1:1xq:e8m0:even:rne"])
def test_malformed_specs_say_what_is_expected(spec):
    with pytest.raises(ValueError, match="QuantFormat: spec: expected 'element:ROWSxCOLUMNS"):
        QuantFormat.from_string(spec)


def test_spec_of_the_wrong_type():
    with pytest.raises(TypeError, match="QuantFormat: spec: expected str, got QuantFormat"):
        QuantFormat.from_string(MXFP4)


@pytest.mark.parametrize(
    ("format", "shape", "data", "scale"),
    [
        (MXFP4, (3, 5, 33), (3, 5, 17), (3, 5, 2)),
        (NVFP4, (5, 16), (5, 8), (5, 1)),
        (FP8_BLOCK_128X128, (129, 128), (129, 128), (2, 1)),
        (FP8_ROW, (2, 7, 9), (2, 7, 9), (2, 7, 1)),
        (PRESETS["FP8_TENSOR"], (2, 7, 9), (2, 7, 9), (2, 1, 1)),
        (PRESETS["FP8_TENSOR"], (0, 0), (0, 0), (1, 1)),
        (MXFP4, (0, 64), (0, 32), (0, 2)),
    ],
)
def test_shapes(format, shape, data, scale):
    assert format.data_shape(shape) == data
    assert format.scale_shape(shape) == scale


def test_units_and_sizes():
    assert MXINT8.max == 127 / 64 and MXINT8.emax == 0 and INT8.max == 127
    assert [PRESETS[n].bits_per_value for n in ("MXFP4", "NVFP4", "MXFP8")] == [4.25, 4.5, 8.25]


def test_values_are_pytrees_of_their_tensors():
    q = QuantTensor(torch.zeros(2, 4), torch.ones(2, 1), None, FP8_ROW, (2, 4))
    p = PackedWeight(
        torch.zeros(8, dtype=torch.uint8),
        None,
        torch.ones(2),
        None,
        "dense:bfloat16",
        (2, 2),
        "plain",
    )
    assert q.nbytes == 40 and p.nbytes == 16
    for value, count in ((q, 2), (p, 2)):
        leaves, tree = pytree.tree_flatten(value)
        assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == count
        again = pytree.tree_unflatten([None if x is None else x + 1 for x in leaves], tree)
        assert type(again) is type(value) and (again.format, again.shape) == (
            value.format,
            value.shape,
        )
        torch.testing.assert_close(again.data, value.data + 1)
    assert q.to("meta").scale.is_meta and p.to("meta").data.is_meta
