// The activations of an expert on 16 values; definitions: python/moesaic/reference/moe/grouped.py.
#pragma once
#include "cpu/simd/simd.h"
#include "moesaic/moe.h"

namespace moesaic {
namespace {

// min and clamp that keep NaN; limit = +inf changes nothing.
inline F32x16 at_most(F32x16 x, float limit) { return select(gt(x, set1(limit)), set1(limit), x); }
inline F32x16 clamp(F32x16 x, float limit) {
  return select(gt(set1(-limit), x), set1(-limit), at_most(x, limit));
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
inline F32x16 gelu_tanh(F32x16 x) {
  const F32x16 cube = mul(mul(x, x), x);
  const F32x16 inner = mul(set1(0.7978845608028654f), fma(cube, set1(0.044715f), x));
  return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

inline F32x16 activate(Activation activation, F32x16 g, F32x16 u, float alpha, float limit) {
  switch (activation) {
    case Activation::kSilu: return mul(silu(at_most(g, limit)), clamp(u, limit));
    case Activation::kGeluTanh: return mul(gelu_tanh(at_most(g, limit)), clamp(u, limit));
    case Activation::kSwigluOai:
      g = at_most(g, limit);
      return mul(add(clamp(u, limit), set1(1.0f)), mul(g, sigmoid(mul(set1(alpha), g))));
    case Activation::kSwigluStep: return mul(at_most(silu(g), limit), clamp(u, limit));
    case Activation::kSitu: {
      const F32x16 a = mul(set1(alpha), tanh(div(g, set1(alpha))));
      return mul(mul(a, sigmoid(g)), mul(set1(limit), tanh(div(u, set1(limit)))));
    }
    case Activation::kRelu2: {
      const F32x16 r = select(gt(zero(), g), zero(), g);
      return mul(r, r);
    }
    default: return silu(g);
  }
}

}  // namespace
}  // namespace moesaic
