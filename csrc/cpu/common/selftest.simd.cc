// Runs one primitive of the vocabulary over arrays; see moesaic/selftest.h.
#include "moesaic/selftest.h"

#include "cpu/simd/simd.h"

namespace moesaic::MOESAIC_ISA {
namespace {

F32x16 apply(SimdPrimitive primitive, F32x16 a, F32x16 b, F32x16 c) {
  switch (primitive) {
    case SimdPrimitive::kAdd: return add(a, b);
    case SimdPrimitive::kSub: return sub(a, b);
    case SimdPrimitive::kMul: return mul(a, b);
    case SimdPrimitive::kDiv: return div(a, b);
    case SimdPrimitive::kFma: return fma(a, b, c);
    case SimdPrimitive::kMin: return min(a, b);
    case SimdPrimitive::kMax: return max(a, b);
    case SimdPrimitive::kExp: return exp(a);
    case SimdPrimitive::kLog: return log(a);
    case SimdPrimitive::kTanh: return tanh(a);
    case SimdPrimitive::kRoundEven: return round_even(a);
    case SimdPrimitive::kSelect: return select(gt(a, b), c, a);
    case SimdPrimitive::kSum: return set1(reduce_add(a));
    case SimdPrimitive::kHorizontalMax: return set1(reduce_max(a));
    default: return zero();
  }
}

}  // namespace

void simd_selftest(const SimdSelftestArgs& args) {
  const uint16_t* a16 = static_cast<const uint16_t*>(args.a);
  const float* a32 = static_cast<const float*>(args.a);
  uint16_t* out16 = static_cast<uint16_t*>(args.out);
  float* out32 = static_cast<float*>(args.out);
  for (int64_t i = 0; i < args.n; i += 16) {
    switch (args.primitive) {
      case SimdPrimitive::kLoadBF16: store(out32 + i, load_bf16(a16 + i)); break;
      case SimdPrimitive::kLoadF16: store(out32 + i, load_f16(a16 + i)); break;
      case SimdPrimitive::kStoreBF16: store_bf16(out16 + i, load(a32 + i)); break;
      case SimdPrimitive::kStoreF16: store_f16(out16 + i, load(a32 + i)); break;
      default: store(out32 + i, apply(args.primitive, load(a32 + i), load(args.b + i), load(args.c + i)));
    }
  }
}

}  // namespace moesaic::MOESAIC_ISA
