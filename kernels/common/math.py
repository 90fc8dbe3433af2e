"""Functions that Triton lacks or that need care at the ends of their range."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh to about 2 ulp: its series near 0, where 1 - 2 / (e^2x + 1) would cancel, else that."""
    square = x * x
    series = 21844.0 / 6081075.0
    series = series * square - 1382.0 / 155925.0
    series = series * square + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    series = x + x * square * series
    magnitude = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.5, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def online_softmax(scores, top, total):
    """One step of a softmax over tiles, in base 2.

    scores [R, C] are log2 weights, -inf where masked; top [R] and total [R] describe the tiles so
    far (the maximum, and the sum of exp2(score - top)). Returns this tile's exp2(score - top'),
    the factor that brings earlier sums to the new maximum, and the new top and total. Rows that
    have seen only -inf keep top -inf and total 0.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - pivot[:, None])
    factor = tl.exp2(top - pivot)
    return weights, factor, new_top, total * factor + tl.sum(weights, 1)


@triton.jit
def log1p(t):
    """log(1 + t) for t in [0, 1] to about 2 ulp: 2 atanh(t / (2 + t)) by its series.

    The hardware's logarithm has a fixed absolute error, which near 1 is no digit at all.
    """
    s = t / (2.0 + t)
    square = s * s
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return 2.0 * (s + s * square * series)
