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
  int64_t steps;  // F32x16 FMAs a thread, 32 flops each; rounded down to a multiple of the chains
  int threads;
  float* sum;  // [1]
};

}  // namespace moesaic
