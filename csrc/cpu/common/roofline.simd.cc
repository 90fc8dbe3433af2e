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

// Six vectors are twelve AVX2 registers: enough chains to hide the latency of two FMA units.
float fma_chains(int64_t iterations) {
  const F32x16 x = set1(0.999f), y = set1(1e-3f);
  F32x16 c0 = x, c1 = x, c2 = x, c3 = x, c4 = x, c5 = x;
  for (int64_t i = 0; i < iterations; ++i) {
    c0 = fma(c0, x, y), c1 = fma(c1, x, y), c2 = fma(c2, x, y);
    c3 = fma(c3, x, y), c4 = fma(c4, x, y), c5 = fma(c5, x, y);
  }
  return reduce_add(add(add(add(c0, c1), add(c2, c3)), add(c4, c5)));
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
    if (fma_chains(args.iterations) == 1.2345f) sink.store(1);
  });
  *args.sum = float(sink.load());
}

}  // namespace moesaic::MOESAIC_ISA
