// Quantize and dequantize.  The rules are those of python/moesaic/reference/quant.py, bit for bit.
//
// Matrices are [batch, n, k] with a contiguous last dimension.  Blocks of block_rows x block_cols share
// a scale; 0 stands for the whole dimension, which is one block even when it is empty.  Blocks at the
// end of a dimension may be shorter.
//
//   data    [batch, n, row bytes]  one code a byte; E2M1 two, low nibble = even k, last high nibble 0
//   scale   [batch, ceil(n / block_rows), ceil(k / block_cols)]  fp32, or bytes for kE8M0 and kE4M3
#pragma once
#include <cstdint>

#include "moesaic/formats.h"

namespace moesaic {

enum class Element : int32_t {
  kE4M3FN = 0,
  kE5M2 = 1,
  kE4M3FNUZ = 2,
  kE5M2FNUZ = 3,
  kE2M1 = 4,
  kE2M3 = 5,
  kE3M2 = 6,
  kInt8 = 7,
};
enum class ScaleType : int32_t { kFloat32 = 0, kE8M0 = 1, kE4M3 = 2 };
enum class ScaleRule : int32_t { kExact = 0, kFloor = 1, kRceil = 2, kEven = 3, kCeil = 4 };

// What a format says; block_cols of kE2M1 is even.
struct BlockFormat {
  Element element;
  ScaleType scale_type;
  ScaleRule rule;
  int64_t block_rows, block_cols;
};

// An fp32 multiplier above the block scales: value[batch * batch_stride + row * row_stride], or null.
struct GlobalScale {
  const float* value;
  int64_t batch_stride, row_stride;
};

struct QuantizeArgs {
  BlockFormat format;
  const void* x;  // fp32, bf16 or fp16; strides in elements
  DType x_dtype;
  int64_t batch, n, k, batch_stride, row_stride;
  bool static_scale;         // scale is an input (a NaN in a block of a type without NaN still changes it)
  float eps, amax_ub;        // bounds of a block's largest magnitude
  GlobalScale global_scale;  // constant over the rows of a block
  uint8_t* data;
  void* scale;
  int threads;
};

// amax [batch, n]: the largest magnitude of each row, NaN left out, Inf as the largest finite fp32.
struct RowAmaxArgs {
  const void* x;
  DType x_dtype;
  int64_t batch, n, k, batch_stride, row_stride;
  float* amax;
  int threads;
};

// out [batch, n, k] contiguous fp32, bf16 or fp16 = (code value * scale) * global_scale.
struct DequantizeArgs {
  BlockFormat format;
  int64_t batch, n, k;
  const uint8_t* data;
  const void* scale;
  GlobalScale global_scale;
  void* out;
  DType out_dtype;
  int threads;
};

}  // namespace moesaic
