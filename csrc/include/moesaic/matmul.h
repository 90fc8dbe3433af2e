// Packed weights and the matmul on them.
//
// A packed weight is the same bytes on every instruction set.  The N outputs are cut into panels of
// 16, the K inputs into groups of 4; a panel is its groups one after another, so a kernel that owns a
// panel reads one sequential stream:
//
//   data   [experts][panels][groups][group_bytes(element)]   panels = ceil(N/16), groups = ceil(K/4)
//   scale  kE8M0, kE4M3   bytes  [experts][panels][kblocks][16]
//          kFloat32       fp32   [experts][panels][kblocks][16]
//          kShared        fp32   [experts][ceil(panels/scale_panels)][kblocks]
//   row_scale, poison     fp32   [experts][panels][16]
//
// Outputs past N and inputs past K hold code 0 and scale 0.  Inside a group, k = 4 * group + kk:
//
//   E2M1         32 bytes: byte 16*((i>>2)&1) + 8*(i>>3) + 2*(i&3) + (kk&1) of output i holds kk in its
//                low and kk + 2 in its high nibble.  After two byte look-ups an unpack of 128-bit lanes
//                gives dwords of two bf16, outputs in order.
//   8-bit codes  64 bytes: 16-bit words (kk0 | kk1 << 8) of the 16 outputs, then (kk2 | kk3 << 8)
//   bf16         128 bytes: 32-bit words (kk0 | kk1 << 16) of the 16 outputs, then (kk2 | kk3 << 16)
//   fp16, fp32   [4][16] values
#pragma once
#include <cstdint>

#include "moesaic/formats.h"

namespace moesaic {

enum class ScaleKind : int32_t { kNone = 0, kE8M0 = 1, kE4M3 = 2, kFloat32 = 3, kShared = 4 };

struct PackedMatrix {
  DType element;  // kE2M1, kE4M3FN, kE5M2, kInt8, kBFloat16, kFloat16 or kFloat32
  ScaleKind scale_kind;
  int64_t experts, n, k;
  int64_t block;         // k that share a scale: a multiple of 4 in [4, 256]; 128 for kNone
  int64_t scale_panels;  // kShared: panels that share a scale
  float unit;            // power of two that the accumulators are multiplied by, before row_scale
  const uint8_t* data;
  const void* scale;
  const float* row_scale;  // or null
  const float* poison;     // 0 or NaN, added at the end; or null
};

// Bytes of a group: 4 k of 16 outputs.
constexpr int64_t group_bytes(DType element) {
  switch (element) {
    case DType::kE2M1: return 32;
    case DType::kE4M3FN:
    case DType::kE5M2:
    case DType::kInt8: return 64;
    case DType::kBFloat16:
    case DType::kFloat16: return 128;
    default: return 256;
  }
}

// out = x . weight^T * unit * row_scale + bias + poison; the order of operations is gemm.h's.
struct QuantLinearArgs {
  PackedMatrix weight;  // experts = 1
  const void* x;        // [m, k], rows x_stride elements apart
  DType x_dtype;        // kFloat32, kBFloat16, kFloat16
  int64_t m, x_stride;
  const float* bias;  // [n] or null
  void* out;          // [m, n] contiguous
  DType out_dtype;    // kFloat32, kBFloat16, kFloat16
  int threads;
};

// Plain codes <-> packed codes; scales are rearranged by the caller.
struct PackArgs {
  DType element;
  int64_t experts, n, k;
  uint8_t* plain;   // [experts, n, row bytes] contiguous; E2M1: ceil(k/2) bytes a row
  uint8_t* packed;  // the layout above
  // pack only: poison[expert][panels * 16] becomes NaN for rows with (code & nan_mask) == nan_code,
  // else 0; null for elements that decode their NaN themselves.
  float* poison;
  uint8_t nan_mask, nan_code;
  int threads;
};

void pack_codes(const PackArgs& args);
void unpack_codes(const PackArgs& args);

}  // namespace moesaic
