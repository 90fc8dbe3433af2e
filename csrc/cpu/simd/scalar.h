// The vocabulary without vector instructions: the definition of every name in it.
#pragma once
#include "half.h"

namespace moesaic {
namespace {

constexpr int kVectors = 8;  // F32x16 values that the register file holds
struct F32x16 {
  float v[16];
};
struct U32x16 {
  uint32_t v[16];
};
struct Mask16 {
  bool v[16];
};

#define MOESAIC_LANES(Type, expression)               \
  Type r;                                             \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r

inline F32x16 set1(float x) { MOESAIC_LANES(F32x16, x); }
inline F32x16 zero() { return set1(0.0f); }
inline F32x16 load(const float* p) { MOESAIC_LANES(F32x16, p[i]); }
inline F32x16 load_n(const float* p, int n) { MOESAIC_LANES(F32x16, i < n ? p[i] : 0.0f); }
inline void store(float* p, F32x16 a) { std::memcpy(p, a.v, 64); }
inline void store_n(float* p, F32x16 a, int n) { std::memcpy(p, a.v, 4 * n); }

inline F32x16 add(F32x16 a, F32x16 b) { MOESAIC_LANES(F32x16, a.v[i] + b.v[i]); }
inline F32x16 sub(F32x16 a, F32x16 b) { MOESAIC_LANES(F32x16, a.v[i] - b.v[i]); }
inline F32x16 mul(F32x16 a, F32x16 b) { MOESAIC_LANES(F32x16, a.v[i] * b.v[i]); }
inline F32x16 div(F32x16 a, F32x16 b) { MOESAIC_LANES(F32x16, a.v[i] / b.v[i]); }
inline F32x16 sqrt(F32x16 a) { MOESAIC_LANES(F32x16, std::sqrt(a.v[i])); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { MOESAIC_LANES(F32x16, std::fma(a.v[i], b.v[i], c.v[i])); }
// p = fma(a, b, p), for accumulators that must stay in their registers.
inline void fma_to(F32x16& p, F32x16 a, F32x16 b) { p = fma(a, b, p); }
inline F32x16 min(F32x16 a, F32x16 b) { MOESAIC_LANES(F32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F32x16 max(F32x16 a, F32x16 b) { MOESAIC_LANES(F32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F32x16 round_even(F32x16 a) { MOESAIC_LANES(F32x16, std::nearbyint(a.v[i])); }

inline U32x16 set1_u32(uint32_t x) { MOESAIC_LANES(U32x16, x); }
inline U32x16 load_u32(const void* p) {
  U32x16 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void store_u32(void* p, U32x16 a) { std::memcpy(p, a.v, 64); }
inline U32x16 load_u8(const uint8_t* p) { MOESAIC_LANES(U32x16, p[i]); }
inline U32x16 load_u16(const uint16_t* p) { MOESAIC_LANES(U32x16, p[i]); }
// Low byte / low 16 bits of each lane.
inline void store_u8(uint8_t* p, U32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = uint8_t(a.v[i]);
}
inline void store_u16(uint16_t* p, U32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = uint16_t(a.v[i]);
}
// 16 four-bit codes in 8 bytes, the even lane in the low nibble; to be stored they must be below 16.
inline U32x16 load_nibbles(const uint8_t* p) { MOESAIC_LANES(U32x16, (p[i / 2] >> (4 * (i % 2))) & 15u); }
inline void store_nibbles(uint8_t* p, U32x16 a) {
  for (int i = 0; i < 8; ++i) p[i] = uint8_t(a.v[2 * i] | (a.v[2 * i + 1] << 4));
}
inline U32x16 bits(F32x16 a) {
  U32x16 r;
  std::memcpy(r.v, a.v, 64);
  return r;
}
inline F32x16 as_float(U32x16 a) {
  F32x16 r;
  std::memcpy(r.v, a.v, 64);
  return r;
}
inline U32x16 add(U32x16 a, U32x16 b) { MOESAIC_LANES(U32x16, a.v[i] + b.v[i]); }
inline U32x16 sub(U32x16 a, U32x16 b) { MOESAIC_LANES(U32x16, a.v[i] - b.v[i]); }
inline U32x16 bit_and(U32x16 a, U32x16 b) { MOESAIC_LANES(U32x16, a.v[i] & b.v[i]); }
inline U32x16 bit_or(U32x16 a, U32x16 b) { MOESAIC_LANES(U32x16, a.v[i] | b.v[i]); }
inline U32x16 bit_xor(U32x16 a, U32x16 b) { MOESAIC_LANES(U32x16, a.v[i] ^ b.v[i]); }
template <int n>
inline U32x16 shl(U32x16 a) {
  MOESAIC_LANES(U32x16, a.v[i] << n);
}
template <int n>
inline U32x16 shr(U32x16 a) {
  MOESAIC_LANES(U32x16, a.v[i] >> n);
}
template <int n>
inline U32x16 sar(U32x16 a) {
  MOESAIC_LANES(U32x16, uint32_t(int32_t(a.v[i]) >> n));
}
inline U32x16 min_s32(U32x16 a, U32x16 b) {
  MOESAIC_LANES(U32x16, int32_t(a.v[i]) < int32_t(b.v[i]) ? a.v[i] : b.v[i]);
}
inline U32x16 max_s32(U32x16 a, U32x16 b) {
  MOESAIC_LANES(U32x16, int32_t(a.v[i]) > int32_t(b.v[i]) ? a.v[i] : b.v[i]);
}
// To the nearest integer, ties to even; |a| < 2^31.
inline U32x16 to_s32(F32x16 a) { MOESAIC_LANES(U32x16, uint32_t(int32_t(std::nearbyint(a.v[i])))); }
inline F32x16 from_s32(U32x16 a) { MOESAIC_LANES(F32x16, float(int32_t(a.v[i]))); }

inline Mask16 gt(F32x16 a, F32x16 b) { MOESAIC_LANES(Mask16, a.v[i] > b.v[i]); }
inline Mask16 ge(F32x16 a, F32x16 b) { MOESAIC_LANES(Mask16, a.v[i] >= b.v[i]); }
inline Mask16 eq(F32x16 a, F32x16 b) { MOESAIC_LANES(Mask16, a.v[i] == b.v[i]); }
inline Mask16 is_nan(F32x16 a) { MOESAIC_LANES(Mask16, a.v[i] != a.v[i]); }
inline Mask16 eq(U32x16 a, U32x16 b) { MOESAIC_LANES(Mask16, a.v[i] == b.v[i]); }
inline Mask16 gt_s32(U32x16 a, U32x16 b) { MOESAIC_LANES(Mask16, int32_t(a.v[i]) > int32_t(b.v[i])); }
inline Mask16 first_n(int n) { MOESAIC_LANES(Mask16, i < n); }
inline Mask16 mask_and(Mask16 a, Mask16 b) { MOESAIC_LANES(Mask16, a.v[i] && b.v[i]); }
inline Mask16 mask_or(Mask16 a, Mask16 b) { MOESAIC_LANES(Mask16, a.v[i] || b.v[i]); }
inline Mask16 mask_not(Mask16 a) { MOESAIC_LANES(Mask16, !a.v[i]); }
inline uint32_t mask_bits(Mask16 a) {
  uint32_t r = 0;
  for (int i = 0; i < 16; ++i) r |= uint32_t(a.v[i]) << i;
  return r;
}
// m ? a : b
inline F32x16 select(Mask16 m, F32x16 a, F32x16 b) { MOESAIC_LANES(F32x16, m.v[i] ? a.v[i] : b.v[i]); }
inline U32x16 select(Mask16 m, U32x16 a, U32x16 b) { MOESAIC_LANES(U32x16, m.v[i] ? a.v[i] : b.v[i]); }

inline F32x16 load_bf16(const uint16_t* p) { MOESAIC_LANES(F32x16, bf16_to_float(p[i])); }
inline F32x16 load_f16(const uint16_t* p) { MOESAIC_LANES(F32x16, half_to_float(p[i])); }
inline void store_bf16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a.v[i]);
}
inline void store_f16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
}

// Packed weight codes -> fp32; the byte order is in moesaic/matmul.h.
// E2M1: 32 bytes hold 4 k of 16 outputs; k0 and k1 get the k = 2 * pair and the next.
template <int pair>
inline void decode_e2m1(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const float value[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  for (int i = 0; i < 16; ++i) {
    const uint8_t* two = p + 16 * ((i >> 2) & 1) + 8 * (i >> 3) + 2 * (i & 3);
    k0.v[i] = value[(two[0] >> (4 * pair)) & 15];
    k1.v[i] = value[(two[1] >> (4 * pair)) & 15];
  }
}
// E4M3 through fp16: the code's exponent and mantissa moved into place give value / 256, exactly and
// for subnormals too.  A NaN code gives +-1.875, which the packed weight's poison makes good.
inline float e4m3_over_256(uint8_t c) { return half_to_float(uint16_t((c & 0x80) << 8 | (c & 0x7f) << 7)); }
// E4M3 and E5M2: 32 bytes, 2 k of 16 outputs.
inline void decode_e4m3(const uint8_t* p, F32x16& k0, F32x16& k1) {
  for (int i = 0; i < 16; ++i) k0.v[i] = e4m3_over_256(p[2 * i]), k1.v[i] = e4m3_over_256(p[2 * i + 1]);
}
inline void decode_e5m2(const uint8_t* p, F32x16& k0, F32x16& k1) {
  for (int i = 0; i < 16; ++i)
    k0.v[i] = half_to_float(uint16_t(p[2 * i] << 8)), k1.v[i] = half_to_float(uint16_t(p[2 * i + 1] << 8));
}
// 16 consecutive E4M3 codes: value / 256.
inline F32x16 load_e4m3(const uint8_t* p) { MOESAIC_LANES(F32x16, e4m3_over_256(p[i])); }

// 32 bf16 at once without a shuffle: element 2i to lane i of even, 2i + 1 to lane i of odd; and back.
inline void load_bf16_pairs(const uint16_t* p, F32x16& even, F32x16& odd) {
  for (int i = 0; i < 16; ++i) even.v[i] = bf16_to_float(p[2 * i]), odd.v[i] = bf16_to_float(p[2 * i + 1]);
}
inline void store_bf16_pairs(uint16_t* p, F32x16 even, F32x16 odd) {
  for (int i = 0; i < 16; ++i) p[2 * i] = float_to_bf16(even.v[i]), p[2 * i + 1] = float_to_bf16(odd.v[i]);
}

inline float reduce_add(F32x16 a) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] = a.v[i] + a.v[i + w];
  return a.v[0];
}
// reduce_add of four vectors, to out[0], out[1 * stride], ...
inline void reduce_add4(F32x16 a, F32x16 b, F32x16 c, F32x16 d, float* out, int64_t stride) {
  out[0] = reduce_add(a), out[stride] = reduce_add(b), out[2 * stride] = reduce_add(c),
  out[3 * stride] = reduce_add(d);
}
inline float reduce_max(F32x16 a) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] = a.v[i] > a.v[i + w] ? a.v[i] : a.v[i + w];
  return a.v[0];
}
inline uint32_t reduce_max_s32(U32x16 a) {
  int32_t r = int32_t(a.v[0]);
  for (int i = 1; i < 16; ++i) r = int32_t(a.v[i]) > r ? int32_t(a.v[i]) : r;
  return uint32_t(r);
}
#undef MOESAIC_LANES

}  // namespace
}  // namespace moesaic
