"""An independent quantizer, block by block: numpy fp32, ml_dtypes casts and exact fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np

ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
}
MAX = {"e4m3fn": 448, "e5m2": 57344, "e4m3fnuz": 240, "e5m2fnuz": 57344, "e2m1": 6, "e2m3": 7.5,
       "e3m2": 28, "int8": 127}  # fmt: skip
MANTISSA = {"e4m3fn": 3, "e5m2": 2, "e4m3fnuz": 3, "e5m2fnuz": 2, "e2m1": 1, "e2m3": 3, "e3m2": 2,
            "int8": 6}  # fmt: skip
NAN_CODE = {"e4m3fn": 0x7F, "e5m2": 0x7F, "e4m3fnuz": 0x80, "e5m2fnuz": 0x80}
F32 = np.float32


def floor_log2(value: Fraction) -> int:
    k = value.numerator.bit_length() - value.denominator.bit_length()
    return k if Fraction(2) ** k <= value else k - 1


def power_of_two(amax: float, top: Fraction, mantissa_bits: int, rule: str) -> int:
    """k of the scale 2**k, unclamped, by exact arithmetic on the definition in docs/formats.md."""
    a = Fraction(float(amax))
    e = floor_log2(top)
    low = floor_log2(a)
    if rule == "floor":
        return low - e
    if rule == "ceil":
        return (low if Fraction(2) ** low == a else low + 1) - e
    if rule == "even":
        steps = a / Fraction(2) ** (low - mantissa_bits) + Fraction(1, 2)
        return floor_log2(Fraction(steps.numerator // steps.denominator)) - mantissa_bits + low - e
    k = low - e - 1  # rceil
    while a > top * Fraction(2) ** k:
        k += 1
    return k


def encode(quotients: np.ndarray, element: str) -> np.ndarray:
    """Codes of fp32 values: clamp, then the round-to-nearest-even cast of numpy or ml_dtypes."""
    clamped = np.clip(quotients, -MAX[element], MAX[element]).astype(F32)
    if element == "int8":
        return np.rint(np.nan_to_num(clamped)).astype(np.int8).view(np.uint8)
    with np.errstate(invalid="ignore"):
        codes = np.nan_to_num(clamped).astype(ML_DTYPES[element]).view(np.uint8).copy()
    codes[np.isnan(clamped)] = NAN_CODE.get(element, 0)
    return codes


def quantize_block(block: np.ndarray, format, global_scale, divisor=None):
    """(stored scale as its bit pattern or fp32, codes) of one block of fp32 values."""
    element, unit = format.element, Fraction(1)
    if element == "int8" and format.scale == "e8m0":
        unit = Fraction(1, 64)
    top = Fraction(MAX[element]) * unit
    finite = np.abs(block[~np.isnan(block)])
    amax = F32(min(finite.max(initial=F32(0)), np.finfo(F32).max))
    if format.scale_rule != "exact":
        k = 0 if amax == 0 else power_of_two(amax, top, MANTISSA[element], format.scale_rule)
        k = min(max(k, -127), 127)
        stored, scale = (k + 127 if format.scale == "e8m0" else F32(2.0**k)), F32(2.0**k)
    elif format.scale == "fp32":
        scale = F32(1) if amax == 0 else max(F32(amax / F32(top)), np.finfo(F32).tiny)
        stored = scale
    else:
        scale = F32(amax / F32(divisor or top))
        scale = scale if global_scale is None else F32(scale / global_scale)
        scale = F32(1) if amax == 0 else np.clip(scale, F32(2.0**-9), F32(448))
        narrow = scale.astype(ml_dtypes.float8_e4m3fn)
        stored, scale = int(narrow.view(np.uint8)), narrow.astype(F32)
    step = scale if global_scale is None else F32(scale * global_scale)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = encode((block / step).astype(F32) / F32(unit), element)
    if element not in NAN_CODE and np.isnan(block).any():
        codes = np.zeros_like(codes)
        stored = {"fp32": F32(np.nan), "e8m0": 0xFF, "e4m3": 0x7F}[format.scale]
    return stored, codes
