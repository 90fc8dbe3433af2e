// Elementary functions, written once against the vocabulary: the same bits on every instruction set.
#pragma once

namespace moesaic {
namespace {

// e^x.  Cody-Waite reduction x = n ln2 + r, |r| <= ln2 / 2, and a degree 6 polynomial (Cephes expf);
// below 1.1 ulp.  -inf and x < -104 give 0, x > 88.73 gives +inf, NaN gives NaN; results below 2^-126
// are subnormal, rounded once more.
inline F32x16 exp(F32x16 x) {
  const F32x16 low = set1(-104.0f), high = set1(88.73f);
  const F32x16 clamped = min(max(x, low), high);
  const F32x16 n = round_even(mul(clamped, set1(1.44269504088896341f)));
  F32x16 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  // 2^n in two factors, so that n = -150 and n = 128 stay in range.
  const U32x16 whole = to_s32(n), half = sar<1>(whole), rest = sub(whole, half);
  const U32x16 bias = set1_u32(127);
  p = mul(mul(p, as_float(shl<23>(add(half, bias)))), as_float(shl<23>(add(rest, bias))));
  p = select(gt(x, high), set1(INFINITY), p);
  p = select(gt(low, x), zero(), p);
  return select(is_nan(x), x, p);
}

// Natural logarithm of x > 0 (Cephes logf, below 1 ulp); 0 gives -inf, +inf +inf, x < 0 and NaN NaN.
inline F32x16 log(F32x16 x) {
  const Mask16 tiny = gt(set1(1.17549435e-38f), x);
  const F32x16 scaled = select(tiny, mul(x, set1(8388608.0f)), x);
  const U32x16 u = bits(scaled);
  // mantissa in [sqrt(1/2), sqrt(2))
  const U32x16 offset = sub(u, set1_u32(0x3f3504f3));
  F32x16 e = from_s32(sar<23>(offset));
  e = select(tiny, sub(e, set1(23.0f)), e);
  const F32x16 m =
      sub(as_float(add(bit_and(offset, set1_u32(0x007fffff)), set1_u32(0x3f3504f3))), set1(1.0f));
  const F32x16 z = mul(m, m);
  F32x16 p = set1(7.0376836292e-2f);
  p = fma(p, m, set1(-1.1514610310e-1f));
  p = fma(p, m, set1(1.1676998740e-1f));
  p = fma(p, m, set1(-1.2420140846e-1f));
  p = fma(p, m, set1(1.4249322787e-1f));
  p = fma(p, m, set1(-1.6668057665e-1f));
  p = fma(p, m, set1(2.0000714765e-1f));
  p = fma(p, m, set1(-2.4999993993e-1f));
  p = fma(p, m, set1(3.3333331174e-1f));
  F32x16 y = mul(mul(p, m), z);
  y = fma(e, set1(-2.12194440e-4f), y);
  y = fma(z, set1(-0.5f), y);
  F32x16 r = fma(e, set1(0.693359375f), add(m, y));
  r = select(eq(x, zero()), set1(-INFINITY), r);
  r = select(eq(x, set1(INFINITY)), x, r);
  r = select(gt(zero(), x), set1(NAN), r);
  return select(is_nan(x), x, r);
}

// tanh x: an odd polynomial below 0.625 (Cephes tanhf), else 1 - 2 / (e^2|x| + 1), which cannot overflow.
inline F32x16 tanh(F32x16 x) {
  const U32x16 sign = bit_and(bits(x), set1_u32(0x80000000u));
  const F32x16 a = as_float(bit_and(bits(x), set1_u32(0x7fffffffu)));
  const F32x16 z = mul(x, x);
  F32x16 p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const F32x16 small = fma(mul(p, z), x, x);
  const F32x16 one = set1(1.0f);
  const F32x16 large = sub(one, div(set1(2.0f), add(exp(add(a, a)), one)));
  const F32x16 r = select(gt(set1(0.625f), a), small, as_float(bit_or(bits(large), sign)));
  return select(is_nan(x), x, r);
}

// x / (1 + e^-x)
inline F32x16 silu(F32x16 x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }
inline F32x16 sigmoid(F32x16 x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

}  // namespace
}  // namespace moesaic
