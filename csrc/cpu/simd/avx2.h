// The vocabulary on AVX2 + FMA + F16C: a vector is two registers, lanes 0-7 and 8-15.
// Names and meanings: simd.h and scalar.h.
#pragma once
#include <immintrin.h>

#include "half.h"

namespace moesaic {
namespace {

constexpr int kVectors = 8;  // F32x16 values that the register file holds
struct F32x16 {
  __m256 lo, hi;
};
struct U32x16 {
  __m256i lo, hi;
};
struct Mask16 {
  __m256 lo, hi;
};  // all ones or all zeros in each 32-bit lane

// Lane i of the result is all ones if i < n.
inline __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline F32x16 set1(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n)), _mm256_maskload_ps(p + 8, lanes_below(n - 8))};
}
inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float* p, F32x16 a, int n) {
  _mm256_maskstore_ps(p, lanes_below(n), a.lo);
  _mm256_maskstore_ps(p + 8, lanes_below(n - 8), a.hi);
}

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// Spelled out, because a compiler that may choose among the three operand orders moves accumulators
// about and runs out of its 16 registers.
inline void fma_to(F32x16& p, F32x16 a, F32x16 b) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(p.lo) : "x"(a.lo), "x"(b.lo));
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(p.hi) : "x"(a.hi), "x"(b.hi));
}
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32x16 round_even(F32x16 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}

inline U32x16 set1_u32(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(int(x));
  return {v, v};
}
inline U32x16 load_u32(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_u32(void* p, U32x16 a) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, a.lo);
  _mm256_storeu_si256(q + 1, a.hi);
}
inline U32x16 load_u8(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
inline U32x16 load_u16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
// 16 lanes narrowed to their low 16 bits, in order.
inline __m256i narrow_u16(U32x16 a) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
inline void store_u16(uint16_t* p, U32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_u16(a));
}
inline void store_u8(uint8_t* p, U32x16 a) {
  const __m256i words = _mm256_and_si256(narrow_u16(a), _mm256_set1_epi16(0xff));
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
// 8 bytes of two nibbles each -> 16 bytes, the low nibble first.
inline __m128i split_nibbles(const uint8_t* p) {
  const __m128i v = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm_and_si128(_mm_or_si128(v, _mm_slli_epi16(v, 4)), _mm_set1_epi8(15));
}
inline U32x16 load_nibbles(const uint8_t* p) {
  const __m128i v = split_nibbles(p);
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
inline void store_nibbles(uint8_t* p, U32x16 a) {
  // Shifting a pair of lanes by 28 bits puts the odd code above the even one.
  const __m256i lo = _mm256_or_si256(a.lo, _mm256_srli_epi64(a.lo, 28));
  const __m256i hi = _mm256_or_si256(a.hi, _mm256_srli_epi64(a.hi, 28));
  // Bytes 0 and 8 of each half, to their places: 0 1 | 2 3 from lo, 4 5 | 6 7 from hi.
  const __m256i from_lo = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i from_hi = _mm256_setr_epi8(-1, -1, -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           -1, -1, -1, -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i both = _mm256_or_si256(_mm256_shuffle_epi8(lo, from_lo), _mm256_shuffle_epi8(hi, from_hi));
  const __m128i bytes = _mm_or_si128(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
}
inline U32x16 bits(F32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline F32x16 as_float(U32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline U32x16 add(U32x16 a, U32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline U32x16 sub(U32x16 a, U32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline U32x16 bit_and(U32x16 a, U32x16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline U32x16 bit_or(U32x16 a, U32x16 b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
inline U32x16 bit_xor(U32x16 a, U32x16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
template <int n>
inline U32x16 shl(U32x16 a) {
  return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
template <int n>
inline U32x16 shr(U32x16 a) {
  return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}
template <int n>
inline U32x16 sar(U32x16 a) {
  return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)};
}
inline U32x16 min_s32(U32x16 a, U32x16 b) {
  return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)};
}
inline U32x16 max_s32(U32x16 a, U32x16 b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
inline U32x16 to_s32(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline F32x16 from_s32(U32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

inline Mask16 gt(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline Mask16 ge(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)};
}
inline Mask16 eq(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
inline Mask16 is_nan(F32x16 a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline Mask16 as_mask(__m256i lo, __m256i hi) { return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)}; }
inline Mask16 eq(U32x16 a, U32x16 b) {
  return as_mask(_mm256_cmpeq_epi32(a.lo, b.lo), _mm256_cmpeq_epi32(a.hi, b.hi));
}
inline Mask16 gt_s32(U32x16 a, U32x16 b) {
  return as_mask(_mm256_cmpgt_epi32(a.lo, b.lo), _mm256_cmpgt_epi32(a.hi, b.hi));
}
inline Mask16 first_n(int n) { return as_mask(lanes_below(n), lanes_below(n - 8)); }
inline Mask16 mask_and(Mask16 a, Mask16 b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
inline Mask16 mask_or(Mask16 a, Mask16 b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
inline Mask16 mask_not(Mask16 a) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(a.lo, ones), _mm256_xor_ps(a.hi, ones)};
}
inline uint32_t mask_bits(Mask16 a) {
  return uint32_t(_mm256_movemask_ps(a.lo)) | (uint32_t(_mm256_movemask_ps(a.hi)) << 8);
}
inline F32x16 select(Mask16 m, F32x16 a, F32x16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline U32x16 select(Mask16 m, U32x16 a, U32x16 b) { return bits(select(m, as_float(a), as_float(b))); }

inline F32x16 load_bf16(const uint16_t* p) { return as_float(shl<16>(load_u16(p))); }
inline F32x16 load_f16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline __attribute__((always_inline)) void store_bf16(uint16_t* p, F32x16 a) {
  const U32x16 u = bits(a);
  const U32x16 odd = bit_and(shr<16>(u), set1_u32(1));
  const U32x16 rounded = shr<16>(add(add(u, set1_u32(0x7fff)), odd));
  store_u16(p, select(is_nan(a), set1_u32(0x7fc0), rounded));
}
inline void store_f16(uint16_t* p, F32x16 a) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

// Packed weight codes; see scalar.h.
template <int pair>
inline void decode_e2m1(const uint8_t* p, F32x16& k0, F32x16& k1) {
  // Low and high byte of each code's bf16 pattern.
  const __m256i low = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0x00, 0x00, char(0x80), char(0xc0), 0x00, 0x40, char(0x80), char(0xc0), 0x00, 0x00,
                    char(0x80), char(0xc0), 0x00, 0x40, char(0x80), char(0xc0)));
  const __m256i high = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, char(0x80), char(0xbf), char(0xbf),
                    char(0xbf), char(0xc0), char(0xc0), char(0xc0), char(0xc0)));
  const __m256i nibble = _mm256_set1_epi8(15), odd = _mm256_set1_epi32(int(0xffff0000));
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i code = _mm256_and_si256(pair ? _mm256_srli_epi16(v, 4) : v, nibble);
  const __m256i l = _mm256_shuffle_epi8(low, code), h = _mm256_shuffle_epi8(high, code);
  const __m256i a = _mm256_unpacklo_epi8(l, h), b = _mm256_unpackhi_epi8(l, h);
  k0 = as_float(U32x16{_mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16)});
  k1 = as_float(U32x16{_mm256_and_si256(a, odd), _mm256_and_si256(b, odd)});
}
inline F32x16 from_f16(__m256i h) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
// E4M3 codes in the high bytes of words -> fp16 of value / 256.
inline __m256i e4m3_to_f16(__m256i v) {
  return _mm256_and_si256(_mm256_srai_epi16(v, 1), _mm256_set1_epi16(short(0xbf80)));
}
inline void decode_e4m3(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  k0 = from_f16(e4m3_to_f16(_mm256_slli_epi16(v, 8)));
  k1 = from_f16(e4m3_to_f16(v));
}
inline void decode_e5m2(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  k0 = from_f16(_mm256_slli_epi16(v, 8));
  k1 = from_f16(_mm256_and_si256(v, _mm256_set1_epi16(short(0xff00))));
}
inline F32x16 load_e4m3(const uint8_t* p) {
  const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return from_f16(e4m3_to_f16(_mm256_slli_epi16(v, 8)));
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
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
inline void reduce_add4(F32x16 a, F32x16 b, F32x16 c, F32x16 d, float* out, int64_t stride) {
  const __m256 a8 = _mm256_add_ps(a.lo, a.hi), b8 = _mm256_add_ps(b.lo, b.hi);
  const __m256 c8 = _mm256_add_ps(c.lo, c.hi), d8 = _mm256_add_ps(d.lo, d.hi);
  // Lanes i + 4, then i + 2, then i + 1; the two halves of a register carry two of the sums.
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31));
  const __m256 s2 = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const __m256 s1 = _mm256_add_ps(s2, _mm256_movehdup_ps(s2));  // a and c in lanes 0, 2; b and d in 4, 6
  const __m128 ac = _mm256_castps256_ps128(s1), bd = _mm256_extractf128_ps(s1, 1);
  _mm_store_ss(out, ac);
  _mm_store_ss(out + stride, bd);
  _mm_store_ss(out + 2 * stride, _mm_movehl_ps(ac, ac));
  _mm_store_ss(out + 3 * stride, _mm_movehl_ps(bd, bd));
}
inline float reduce_max(F32x16 a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}
inline uint32_t reduce_max_s32(U32x16 a) {
  const __m256i s8 = _mm256_max_epi32(a.lo, a.hi);
  const __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_max_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(s2, _mm_shuffle_epi32(s2, 0xb1))));
}

}  // namespace
}  // namespace moesaic
