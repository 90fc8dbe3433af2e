// Rows of q, K, V and out in the order the attention kernels compute in.
//
// A row of `dim` elements becomes chunks of 32 fp32 values, zero-padded, two vectors each.  Rows of fp32
// and fp16 caches keep their order.  Rows of bf16 caches are split into even and odd elements, because
// 32 bf16 become two vectors with one shift and one mask and no shuffle.  Scores do not care, as q is
// permuted alike, and out is permuted back when it is stored.
#pragma once
#include "cpu/simd/simd.h"
#include "moesaic/formats.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int kChunk = 32;

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline void load_chunk(const float* p, F32x16& a, F32x16& b) {
  a = load(p);
  b = load(p + 16);
}
inline void load_chunk(const BF16* p, F32x16& a, F32x16& b) { load_bf16_pairs(&p->bits, a, b); }
inline void load_chunk(const F16* p, F32x16& a, F32x16& b) {
  a = load_f16(&p->bits);
  b = load_f16(&p[16].bits);
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t chunks_of(int64_t dim) { return (dim + kChunk - 1) / kChunk; }

// One row of T, `stride` elements apart, in the order of T's own cache.
template <class T>
inline void widen_row(const T* row, int64_t stride, int64_t dim, float* out) {
  for (int64_t c = 0; c < dim; c += kChunk, out += kChunk) {
    T tail[kChunk] = {};
    const T* source = row + c;
    if (stride != 1 || c + kChunk > dim) {
      for (int64_t i = c; i < lesser(dim, c + kChunk); ++i) tail[i - c] = row[i * stride];
      source = tail;
    }
    F32x16 a, b;
    load_chunk(source, a, b);
    store(out, a);
    store(out + 16, b);
  }
}

inline void split_pairs(float* chunk) {
  float odd[16];
  for (int i = 0; i < 16; ++i) odd[i] = chunk[2 * i + 1];
  for (int i = 0; i < 16; ++i) chunk[i] = chunk[2 * i];
  std::memcpy(chunk + 16, odd, sizeof odd);
}

inline void join_pairs(float* chunk) {
  float both[kChunk];
  for (int i = 0; i < 16; ++i) both[2 * i] = chunk[i], both[2 * i + 1] = chunk[i + 16];
  std::memcpy(chunk, both, sizeof both);
}

// One row of q, times scale; `paired` is the order of a bf16 cache.
inline void load_q_row(DType dtype, const void* q, int64_t offset, int64_t dim, bool paired, float scale,
                       float* out) {
  if (dtype == DType::kFloat32) widen_row(static_cast<const float*>(q) + offset, 1, dim, out);
  if (dtype == DType::kFloat16) widen_row(static_cast<const F16*>(q) + offset, 1, dim, out);
  if (dtype == DType::kBFloat16) widen_row(static_cast<const BF16*>(q) + offset, 1, dim, out);
  for (int64_t c = 0; c < dim; c += kChunk) {
    if (paired && dtype != DType::kBFloat16) split_pairs(out + c);
    if (!paired && dtype == DType::kBFloat16) join_pairs(out + c);
    store(out + c, mul(load(out + c), set1(scale)));
    store(out + c + 16, mul(load(out + c + 16), set1(scale)));
  }
}

// row / denominator, to element `offset` of out.
inline void store_out_row(DType dtype, void* out, int64_t offset, int64_t dim, bool paired, const float* row,
                          float denominator) {
  const F32x16 d = set1(denominator);
  for (int64_t c = 0; c < dim; c += kChunk) {
    const F32x16 a = div(load(row + c), d), b = div(load(row + c + 16), d);
    const size_t count = size_t(lesser(kChunk, dim - c));
    if (paired && dtype == DType::kBFloat16 && count == kChunk) {
      store_bf16_pairs(static_cast<uint16_t*>(out) + offset + c, a, b);
      continue;
    }
    float chunk[kChunk];
    store(chunk, a);
    store(chunk + 16, b);
    if (paired) join_pairs(chunk);
    if (dtype == DType::kFloat32) {
      std::memcpy(static_cast<float*>(out) + offset + c, chunk, 4 * count);
      continue;
    }
    uint16_t narrow[kChunk];
    for (int i = 0; i < kChunk; i += 16) {
      if (dtype == DType::kBFloat16)
        store_bf16(narrow + i, load(chunk + i));
      else
        store_f16(narrow + i, load(chunk + i));
    }
    std::memcpy(static_cast<uint16_t*>(out) + offset + c, narrow, 2 * count);
  }
}

}  // namespace
}  // namespace moesaic::MOESAIC_ISA
