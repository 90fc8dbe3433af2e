// The machine's own limits, measured with the same vectors and threads as the kernels.
#pragma once
#include <cstdint>

namespace moesaic {

struct RoofReadArgs {
  const float* data;
  int64_t n;  // fp32 elements, multiple of 64
  int threads;
  float* sum;  // [1], so that no read can be left out
};

struct RoofFmaArgs {
  int64_t iterations;  // each does 6 F32x16 FMAs = 192 flops per thread
  int threads;
  float* sum;  // [1]
};

}  // namespace moesaic
