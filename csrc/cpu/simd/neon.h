// The vocabulary on AArch64 NEON: a vector is four registers of four lanes.
// Names and meanings: simd.h and scalar.h.
#pragma once
#include <arm_neon.h>

#include "half.h"

namespace moesaic {
namespace {

constexpr int kVectors = 8;  // F32x16 values that the register file holds
struct F32x16 {
  float32x4_t v[4];
};
struct U32x16 {
  uint32x4_t v[4];
};
struct Mask16 {
  uint32x4_t v[4];
};  // all ones or all zeros in each lane

#define MOESAIC_QUADS(Type, expression)              \
  Type r;                                            \
  for (int q = 0; q < 4; ++q) r.v[q] = (expression); \
  return r

inline uint32x4_t lanes_below(int n) {
  const int32_t index[4] = {0, 1, 2, 3};
  return vcltq_s32(vld1q_s32(index), vdupq_n_s32(n));
}
inline float32x4_t load_quad_n(const float* p, int n) {
  float t[4] = {0, 0, 0, 0};
  if (n > 0) std::memcpy(t, p, 4 * (n < 4 ? n : 4));
  return vld1q_f32(t);
}
inline void store_quad_n(float* p, float32x4_t a, int n) {
  float t[4];
  vst1q_f32(t, a);
  if (n > 0) std::memcpy(p, t, 4 * (n < 4 ? n : 4));
}

inline F32x16 set1(float x) { MOESAIC_QUADS(F32x16, vdupq_n_f32(x)); }
inline F32x16 zero() { return set1(0.0f); }
inline F32x16 load(const float* p) { MOESAIC_QUADS(F32x16, vld1q_f32(p + 4 * q)); }
inline F32x16 load_n(const float* p, int n) { MOESAIC_QUADS(F32x16, load_quad_n(p + 4 * q, n - 4 * q)); }
inline void store(float* p, F32x16 a) {
  for (int q = 0; q < 4; ++q) vst1q_f32(p + 4 * q, a.v[q]);
}
inline void store_n(float* p, F32x16 a, int n) {
  for (int q = 0; q < 4; ++q) store_quad_n(p + 4 * q, a.v[q], n - 4 * q);
}

inline F32x16 add(F32x16 a, F32x16 b) { MOESAIC_QUADS(F32x16, vaddq_f32(a.v[q], b.v[q])); }
inline F32x16 sub(F32x16 a, F32x16 b) { MOESAIC_QUADS(F32x16, vsubq_f32(a.v[q], b.v[q])); }
inline F32x16 mul(F32x16 a, F32x16 b) { MOESAIC_QUADS(F32x16, vmulq_f32(a.v[q], b.v[q])); }
inline F32x16 div(F32x16 a, F32x16 b) { MOESAIC_QUADS(F32x16, vdivq_f32(a.v[q], b.v[q])); }
inline F32x16 sqrt(F32x16 a) { MOESAIC_QUADS(F32x16, vsqrtq_f32(a.v[q])); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { MOESAIC_QUADS(F32x16, vfmaq_f32(c.v[q], a.v[q], b.v[q])); }
inline void fma_to(F32x16& p, F32x16 a, F32x16 b) { p = fma(a, b, p); }
// FMIN/FMAX propagate NaN; the vocabulary returns the second operand, as x86 does.
inline F32x16 min(F32x16 a, F32x16 b) {
  MOESAIC_QUADS(F32x16, vbslq_f32(vcltq_f32(a.v[q], b.v[q]), a.v[q], b.v[q]));
}
inline F32x16 max(F32x16 a, F32x16 b) {
  MOESAIC_QUADS(F32x16, vbslq_f32(vcgtq_f32(a.v[q], b.v[q]), a.v[q], b.v[q]));
}
inline F32x16 round_even(F32x16 a) { MOESAIC_QUADS(F32x16, vrndnq_f32(a.v[q])); }

inline U32x16 set1_u32(uint32_t x) { MOESAIC_QUADS(U32x16, vdupq_n_u32(x)); }
inline U32x16 load_u32(const void* p) {
  MOESAIC_QUADS(U32x16, vld1q_u32(static_cast<const uint32_t*>(p) + 4 * q));
}
inline void store_u32(void* p, U32x16 a) {
  for (int q = 0; q < 4; ++q) vst1q_u32(static_cast<uint32_t*>(p) + 4 * q, a.v[q]);
}
inline U32x16 load_u16(const uint16_t* p) { MOESAIC_QUADS(U32x16, vmovl_u16(vld1_u16(p + 4 * q))); }
inline U32x16 load_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t lo = vmovl_u8(vget_low_u8(bytes)), hi = vmovl_u8(vget_high_u8(bytes));
  return {{vmovl_u16(vget_low_u16(lo)), vmovl_u16(vget_high_u16(lo)), vmovl_u16(vget_low_u16(hi)),
           vmovl_u16(vget_high_u16(hi))}};
}
inline void store_u16(uint16_t* p, U32x16 a) {
  for (int q = 0; q < 4; ++q) vst1_u16(p + 4 * q, vmovn_u32(a.v[q]));
}
inline void store_u8(uint8_t* p, U32x16 a) {
  const uint16x8_t lo = vcombine_u16(vmovn_u32(a.v[0]), vmovn_u32(a.v[1]));
  const uint16x8_t hi = vcombine_u16(vmovn_u32(a.v[2]), vmovn_u32(a.v[3]));
  vst1q_u8(p, vcombine_u8(vmovn_u16(lo), vmovn_u16(hi)));
}
inline U32x16 load_nibbles(const uint8_t* p) {
  const uint8x8_t v = vld1_u8(p);
  const uint8x8x2_t codes = vzip_u8(vand_u8(v, vdup_n_u8(15)), vshr_n_u8(v, 4));
  const uint16x8_t lo = vmovl_u8(codes.val[0]), hi = vmovl_u8(codes.val[1]);
  return {{vmovl_u16(vget_low_u16(lo)), vmovl_u16(vget_high_u16(lo)), vmovl_u16(vget_low_u16(hi)),
           vmovl_u16(vget_high_u16(hi))}};
}
inline void store_nibbles(uint8_t* p, U32x16 a) {
  uint32x2_t pairs[4];  // the low halves of (even | odd << 4)
  for (int q = 0; q < 4; ++q) {
    const uint64x2_t v = vreinterpretq_u64_u32(a.v[q]);
    pairs[q] = vmovn_u64(vorrq_u64(v, vshrq_n_u64(v, 28)));
  }
  const uint16x4_t lo = vmovn_u32(vcombine_u32(pairs[0], pairs[1])),
                   hi = vmovn_u32(vcombine_u32(pairs[2], pairs[3]));
  vst1_u8(p, vmovn_u16(vcombine_u16(lo, hi)));
}
inline U32x16 bits(F32x16 a) { MOESAIC_QUADS(U32x16, vreinterpretq_u32_f32(a.v[q])); }
inline F32x16 as_float(U32x16 a) { MOESAIC_QUADS(F32x16, vreinterpretq_f32_u32(a.v[q])); }
inline U32x16 add(U32x16 a, U32x16 b) { MOESAIC_QUADS(U32x16, vaddq_u32(a.v[q], b.v[q])); }
inline U32x16 sub(U32x16 a, U32x16 b) { MOESAIC_QUADS(U32x16, vsubq_u32(a.v[q], b.v[q])); }
inline U32x16 bit_and(U32x16 a, U32x16 b) { MOESAIC_QUADS(U32x16, vandq_u32(a.v[q], b.v[q])); }
inline U32x16 bit_or(U32x16 a, U32x16 b) { MOESAIC_QUADS(U32x16, vorrq_u32(a.v[q], b.v[q])); }
inline U32x16 bit_xor(U32x16 a, U32x16 b) { MOESAIC_QUADS(U32x16, veorq_u32(a.v[q], b.v[q])); }
template <int n>
inline U32x16 shl(U32x16 a) {
  MOESAIC_QUADS(U32x16, vshlq_n_u32(a.v[q], n));
}
template <int n>
inline U32x16 shr(U32x16 a) {
  MOESAIC_QUADS(U32x16, vshrq_n_u32(a.v[q], n));
}
template <int n>
inline U32x16 sar(U32x16 a) {
  MOESAIC_QUADS(U32x16, vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a.v[q]), n)));
}
inline int32x4_t as_s32(uint32x4_t a) { return vreinterpretq_s32_u32(a); }
inline U32x16 min_s32(U32x16 a, U32x16 b) {
  MOESAIC_QUADS(U32x16, vreinterpretq_u32_s32(vminq_s32(as_s32(a.v[q]), as_s32(b.v[q]))));
}
inline U32x16 max_s32(U32x16 a, U32x16 b) {
  MOESAIC_QUADS(U32x16, vreinterpretq_u32_s32(vmaxq_s32(as_s32(a.v[q]), as_s32(b.v[q]))));
}
inline U32x16 to_s32(F32x16 a) { MOESAIC_QUADS(U32x16, vreinterpretq_u32_s32(vcvtnq_s32_f32(a.v[q]))); }
inline F32x16 from_s32(U32x16 a) { MOESAIC_QUADS(F32x16, vcvtq_f32_s32(as_s32(a.v[q]))); }

inline Mask16 gt(F32x16 a, F32x16 b) { MOESAIC_QUADS(Mask16, vcgtq_f32(a.v[q], b.v[q])); }
inline Mask16 ge(F32x16 a, F32x16 b) { MOESAIC_QUADS(Mask16, vcgeq_f32(a.v[q], b.v[q])); }
inline Mask16 eq(F32x16 a, F32x16 b) { MOESAIC_QUADS(Mask16, vceqq_f32(a.v[q], b.v[q])); }
inline Mask16 is_nan(F32x16 a) { MOESAIC_QUADS(Mask16, vmvnq_u32(vceqq_f32(a.v[q], a.v[q]))); }
inline Mask16 eq(U32x16 a, U32x16 b) { MOESAIC_QUADS(Mask16, vceqq_u32(a.v[q], b.v[q])); }
inline Mask16 gt_s32(U32x16 a, U32x16 b) { MOESAIC_QUADS(Mask16, vcgtq_s32(as_s32(a.v[q]), as_s32(b.v[q]))); }
inline Mask16 first_n(int n) { MOESAIC_QUADS(Mask16, lanes_below(n - 4 * q)); }
inline Mask16 mask_and(Mask16 a, Mask16 b) { MOESAIC_QUADS(Mask16, vandq_u32(a.v[q], b.v[q])); }
inline Mask16 mask_or(Mask16 a, Mask16 b) { MOESAIC_QUADS(Mask16, vorrq_u32(a.v[q], b.v[q])); }
inline Mask16 mask_not(Mask16 a) { MOESAIC_QUADS(Mask16, vmvnq_u32(a.v[q])); }
inline uint32_t mask_bits(Mask16 a) {
  const uint32_t weight[4] = {1, 2, 4, 8};
  const uint32x4_t w = vld1q_u32(weight);
  uint32_t r = 0;
  for (int q = 0; q < 4; ++q) r |= vaddvq_u32(vandq_u32(a.v[q], w)) << (4 * q);
  return r;
}
inline F32x16 select(Mask16 m, F32x16 a, F32x16 b) {
  MOESAIC_QUADS(F32x16, vbslq_f32(m.v[q], a.v[q], b.v[q]));
}
inline U32x16 select(Mask16 m, U32x16 a, U32x16 b) {
  MOESAIC_QUADS(U32x16, vbslq_u32(m.v[q], a.v[q], b.v[q]));
}

inline F32x16 load_bf16(const uint16_t* p) { return as_float(shl<16>(load_u16(p))); }
inline F32x16 load_f16(const uint16_t* p) {
  MOESAIC_QUADS(F32x16, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * q))));
}
inline __attribute__((always_inline)) void store_bf16(uint16_t* p, F32x16 a) {
  const U32x16 u = bits(a);
  const U32x16 odd = bit_and(shr<16>(u), set1_u32(1));
  const U32x16 rounded = shr<16>(add(add(u, set1_u32(0x7fff)), odd));
  store_u16(p, select(is_nan(a), set1_u32(0x7fc0), rounded));
}
inline void store_f16(uint16_t* p, F32x16 a) {
  for (int q = 0; q < 4; ++q) vst1_u16(p + 4 * q, vreinterpret_u16_f16(vcvt_f16_f32(a.v[q])));
}

// Packed weight codes; see scalar.h.
template <int pair>
inline void decode_e2m1(const uint8_t* p, F32x16& k0, F32x16& k1) {
  // Low and high byte of each code's bf16 pattern.
  const uint8_t low_bytes[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
  const uint8_t high_bytes[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                  0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};
  const uint8x16_t low = vld1q_u8(low_bytes), high = vld1q_u8(high_bytes);
  const uint32x4_t odd = vdupq_n_u32(0xffff0000u);
  for (int lane = 0; lane < 2; ++lane) {
    const uint8x16_t v = vld1q_u8(p + 16 * lane);
    const uint8x16_t code = pair ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15));
    const uint8x16_t l = vqtbl1q_u8(low, code), h = vqtbl1q_u8(high, code);
    const uint32x4_t a = vreinterpretq_u32_u8(vzip1q_u8(l, h)), b = vreinterpretq_u32_u8(vzip2q_u8(l, h));
    k0.v[lane] = vreinterpretq_f32_u32(vshlq_n_u32(a, 16));
    k0.v[lane + 2] = vreinterpretq_f32_u32(vshlq_n_u32(b, 16));
    k1.v[lane] = vreinterpretq_f32_u32(vandq_u32(a, odd));
    k1.v[lane + 2] = vreinterpretq_f32_u32(vandq_u32(b, odd));
  }
}
inline F32x16 from_f16(uint16x8_t lo, uint16x8_t hi) {
  return {{vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(lo))),
           vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(lo))),
           vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(hi))),
           vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(hi)))}};
}
inline uint16x8_t load_words(const uint8_t* p) { return vreinterpretq_u16_u8(vld1q_u8(p)); }
// E4M3 codes in the high bytes of words -> fp16 of value / 256.
inline uint16x8_t e4m3_to_f16(uint16x8_t v) {
  return vandq_u16(vreinterpretq_u16_s16(vshrq_n_s16(vreinterpretq_s16_u16(v), 1)), vdupq_n_u16(0xbf80));
}
inline void decode_e4m3(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const uint16x8_t lo = load_words(p), hi = load_words(p + 16);
  k0 = from_f16(e4m3_to_f16(vshlq_n_u16(lo, 8)), e4m3_to_f16(vshlq_n_u16(hi, 8)));
  k1 = from_f16(e4m3_to_f16(lo), e4m3_to_f16(hi));
}
inline void decode_e5m2(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const uint16x8_t lo = load_words(p), hi = load_words(p + 16), high = vdupq_n_u16(0xff00);
  k0 = from_f16(vshlq_n_u16(lo, 8), vshlq_n_u16(hi, 8));
  k1 = from_f16(vandq_u16(lo, high), vandq_u16(hi, high));
}
inline F32x16 load_e4m3(const uint8_t* p) {
  const uint8x16_t v = vld1q_u8(p);
  return from_f16(e4m3_to_f16(vshll_n_u8(vget_low_u8(v), 8)), e4m3_to_f16(vshll_n_u8(vget_high_u8(v), 8)));
}

// bf16 in the upper half of each lane, rounded to nearest even; a NaN becomes 0x7fc0.
inline U32x16 round_bf16_high(F32x16 a) {
  const U32x16 u = bits(a);
  const U32x16 odd = bit_and(shr<16>(u), set1_u32(1));
  const U32x16 rounded = bit_and(add(add(u, set1_u32(0x7fff)), odd), set1_u32(0xffff0000u));
  return select(is_nan(a), set1_u32(0x7fc00000u), rounded);
}
inline void load_bf16_pairs(const uint16_t* p, F32x16& even, F32x16& odd) {
  const U32x16 both = load_u32(p);
  even = as_float(shl<16>(both));
  odd = as_float(bit_and(both, set1_u32(0xffff0000u)));
}
inline void store_bf16_pairs(uint16_t* p, F32x16 even, F32x16 odd) {
  store_u32(p, bit_or(shr<16>(round_bf16_high(even)), round_bf16_high(odd)));
}

inline float reduce_add(F32x16 a) {
  const float32x4_t s4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
  return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
inline float greater(float a, float b) { return a > b ? a : b; }
inline void reduce_add4(F32x16 a, F32x16 b, F32x16 c, F32x16 d, float* out, int64_t stride) {
  out[0] = reduce_add(a), out[stride] = reduce_add(b), out[2 * stride] = reduce_add(c),
  out[3 * stride] = reduce_add(d);
}
inline float reduce_max(F32x16 a) {
  float v[16];
  store(v, a);
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) v[i] = greater(v[i], v[i + w]);
  return v[0];
}
inline uint32_t reduce_max_s32(U32x16 a) {
  const int32x4_t lo = vmaxq_s32(as_s32(a.v[0]), as_s32(a.v[1])),
                  hi = vmaxq_s32(as_s32(a.v[2]), as_s32(a.v[3]));
  return uint32_t(vmaxvq_s32(vmaxq_s32(lo, hi)));
}
#undef MOESAIC_QUADS

}  // namespace
}  // namespace moesaic
