// Numbers that cross the boundary between Python and C++: element types, as plain enums.
// The values are part of the contract with python/moesaic/backends/cpu/_dtypes.py.
#pragma once
#include <cstdint>

namespace moesaic {

enum class DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kE4M3FN = 3,
  kE5M2 = 4,
  kE2M1 = 5,  // two codes a byte, low nibble = even index
  kInt8 = 6,
  kE8M0 = 7,  // scale 2^(code - 127), 255 = NaN
  kInt32 = 8,
  kInt64 = 9,
};

}  // namespace moesaic
