// The exact matmul on packed weights: fp32 activations times decoded weights, for a range of rows and
// a range of panels.  quant_linear and the MoE layers are built on it.
//
// Numerics, the same on every path, instruction set, tile shape and thread count.  For one output and
// one row, with blocks of B consecutive k (B = PackedMatrix.block) in ascending order:
//
//   p   = fma(x[k], w[k], p) over the k of the block in ascending order, from +0, w the bare element
//   acc = fma(p, scale[block], acc), from +0           (scale = 1 for ScaleKind::kNone)
//
// and at the end finish(): acc * unit, * row_scale, + poison, each rounded to fp32 and each only if
// the weight has it.  Lanes run across outputs, so the bits of a row depend on that row alone.
//
// Activations come packed in *row blocks* of at most kTileRows rows, as even as possible: a block of R
// rows is fp32 [padded_k(K)][R], the blocks one after another (total rows * padded_k(K) floats).
#pragma once
#include "cpu/simd/simd.h"
#include "moesaic/matmul.h"

namespace moesaic {
namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kTileRows = 6;  // with 16 outputs 12 accumulators on AVX2 and 24 on NEON

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t panel_count(const PackedMatrix& w) { return ceil_div(w.n, kPanel); }
inline int64_t padded_k(int64_t k) { return (k + 3) / 4 * 4; }

// `rows` rows as row blocks: how many, where block b begins (a row; b = count gives `rows`).
inline int64_t row_blocks(int64_t rows) { return ceil_div(rows, kTileRows); }
inline int64_t block_begin(int64_t rows, int64_t b) {
  const int64_t count = row_blocks(rows);
  if (count == 0) return 0;
  const int64_t extra = rows % count;
  return b * (rows / count) + (b < extra ? b : extra);
}

inline F32x16 load_as_float(DType dtype, const void* p, int64_t at) {
  switch (dtype) {
    case DType::kBFloat16: return load_bf16(static_cast<const uint16_t*>(p) + at);
    case DType::kFloat16: return load_f16(static_cast<const uint16_t*>(p) + at);
    default: return load(static_cast<const float*>(p) + at);
  }
}
inline float one_as_float(DType dtype, const void* p, int64_t at) {
  switch (dtype) {
    case DType::kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(p)[at]);
    case DType::kFloat16: return half_to_float(static_cast<const uint16_t*>(p)[at]);
    default: return static_cast<const float*>(p)[at];
  }
}

// Pack row block b of `rows` rows into its place in `a`.  row(i) is the address of the k values, of
// type dtype, of row i.
template <class RowAddress>
inline void pack_row_block(DType dtype, int64_t k, int64_t rows, int64_t b, const RowAddress& row, float* a) {
  const int64_t begin = block_begin(rows, b), count = block_begin(rows, b + 1) - begin;
  const int64_t kp = padded_k(k);
  float* out = a + begin * kp;
  alignas(64) float lane[kPanel];
  for (int64_t r = 0; r < count; ++r) {
    const void* x = row(begin + r);
    int64_t i = 0;
    if (count == 1) {
      for (; i + kPanel <= k; i += kPanel) store(out + i, load_as_float(dtype, x, i));
    } else {
      for (; i + kPanel <= k; i += kPanel) {
        store(lane, load_as_float(dtype, x, i));
        for (int64_t j = 0; j < kPanel; ++j) out[(i + j) * count + r] = lane[j];
      }
    }
    for (; i < k; ++i) out[i * count + r] = one_as_float(dtype, x, i);
    for (; i < kp; ++i) out[i * count + r] = 0.0f;
  }
}

// acc of 16 outputs -> their fp32 results (before any bias).
inline F32x16 finish(const PackedMatrix& w, int64_t expert, int64_t panel, F32x16 acc) {
  const int64_t at = (expert * panel_count(w) + panel) * kPanel;
  if (w.unit != 1.0f) acc = mul(acc, set1(w.unit));
  if (w.row_scale) acc = mul(acc, load(w.row_scale + at));
  if (w.poison) acc = add(acc, load(w.poison + at));
  return acc;
}

}  // namespace

// One piece of work: rows [block_begin(rows, block0), block_begin(rows, block1)) times panels [panel0,
// panel1) of one expert.
struct GemmTask {
  const PackedMatrix* weight;
  int64_t expert;
  const float* a;  // all row blocks of `rows` rows
  int64_t rows;
  int64_t block0, block1;  // row blocks
  int64_t panel0, panel1;
  float* acc;  // [panel1 - panel0][rows of the range][16], 64-byte aligned; overwritten
};

// A task is best a few panels and at most kTaskRows rows: with a single row block the weights are decoded in
// registers, else a chunk of the activations stays in L2 while the panels take turns.
constexpr int64_t kTaskRows = 192;

namespace MOESAIC_ISA {
void gemm(const GemmTask& task);
}
}  // namespace moesaic
