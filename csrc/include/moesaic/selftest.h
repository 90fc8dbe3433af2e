// simd_selftest: run one primitive of the vector vocabulary over arrays, so that tests can compare
// every instruction set with the scalar one, bit for bit.
#pragma once
#include <cstdint>

namespace moesaic {

enum class SimdPrimitive : int32_t {
  kAdd,
  kSub,
  kMul,
  kDiv,
  kFma,
  kMin,
  kMax,
  kExp,
  kLog,
  kTanh,
  kRoundEven,
  kSelect,
  kSum,
  kHorizontalMax,
  kLoadBF16,
  kStoreBF16,
  kLoadF16,
  kStoreF16,
};

struct SimdSelftestArgs {
  SimdPrimitive primitive;
  int64_t n;       // multiple of 16
  const void* a;   // fp32 [n]; 16-bit codes [n] for the loads
  const float* b;  // fp32 [n]
  const float* c;  // fp32 [n]
  void* out;       // fp32 [n]; 16-bit codes [n] for the stores
};

}  // namespace moesaic
