// Roofs: a streaming read and a register-only FMA loop; see moesaic/roofline.h.
#include "moesaic/roofline.h"

#include "cpu/parallel.h"
#include "cpu/simd/simd.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// The sum of 64 floats a step in four independent chains.
float sum_of(const float* p, int64_t n) {
  F32x16 s[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < n; i += 64)
    for (int j = 0; j < 4; ++j) s[j] = add(s[j], load(p + i + 16 * j));
  return reduce_add(add(add(s[0], s[1]), add(s[2], s[3])));
}

// Enough chains to hide the latency of two FMA units: 12 registers on AVX2, AVX-512 and NEON alike.
#if MOESAIC_ISA_AVX512
constexpr int kChains = 12;
#elif MOESAIC_ISA_NEON
constexpr int kChains = 3;
#else
constexpr int kChains = 6;
#endif

float fma_chains(int64_t iterations) {
  const F32x16 x = set1(0.999f), y = set1(1e-3f);
  F32x16 c[kChains];
  for (F32x16& chain : c) chain = x;
  for (int64_t i = 0; i < iterations; ++i)
    for (F32x16& chain : c) chain = fma(chain, x, y);
  F32x16 sum = zero();
  for (const F32x16& chain : c) sum = add(sum, chain);
  return reduce_add(sum);
}

}  // namespace

void roof_read(const RoofReadArgs& args) {
  const int64_t chunk = 1 << 16;
  std::atomic<int> sink{0};
  parallel_tasks((args.n + chunk - 1) / chunk, args.threads, [&](int64_t task) {
    const int64_t begin = task * chunk, end = begin + chunk < args.n ? begin + chunk : args.n;
    if (sum_of(args.data + begin, end - begin) == 1.2345f) sink.store(1);
  });
  *args.sum = float(sink.load());
}

void roof_fma(const RoofFmaArgs& args) {
  std::atomic<int> sink{0};
  parallel_tasks(args.threads, args.threads, [&](int64_t) {
    if (fma_chains(args.steps / kChains) == 1.2345f) sink.store(1);
  });
  *args.sum = float(sink.load());
}

}  // namespace moesaic::MOESAIC_ISA
