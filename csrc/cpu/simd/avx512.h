// The vocabulary on AVX-512 (F, BW, VL, DQ): a vector is one register, a mask a mask register.
// Names and meanings: simd.h and scalar.h.
#pragma once
#include <immintrin.h>

#include "half.h"

namespace moesaic {
namespace {

constexpr int kVectors = 32;  // F32x16 values that the register file holds
struct F32x16 {
  __m512 v;
};
struct U32x16 {
  __m512i v;
};
struct Mask16 {
  __mmask16 v;
};

inline __mmask16 lanes_below(int n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 zero() { return {_mm512_setzero_ps()}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_below(n), p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, F32x16 a, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), a.v); }

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline void fma_to(F32x16& p, F32x16 a, F32x16 b) { p = fma(a, b, p); }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 round_even(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline U32x16 set1_u32(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
inline U32x16 load_u32(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_u32(void* p, U32x16 a) { _mm512_storeu_si512(p, a.v); }
inline U32x16 load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline U32x16 load_u16(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_u8(uint8_t* p, U32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void store_u16(uint16_t* p, U32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
inline U32x16 load_nibbles(const uint8_t* p) {
  const __m128i v = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_cvtepu8_epi32(_mm_and_si128(_mm_or_si128(v, _mm_slli_epi16(v, 4)), _mm_set1_epi8(15)))};
}
inline void store_nibbles(uint8_t* p, U32x16 a) {
  // Shifting a pair of lanes by 28 bits puts the odd code above the even one.
  const __m512i pairs = _mm512_or_si512(a.v, _mm512_srli_epi64(a.v, 28));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}
inline U32x16 bits(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline F32x16 as_float(U32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline U32x16 add(U32x16 a, U32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline U32x16 sub(U32x16 a, U32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline U32x16 bit_and(U32x16 a, U32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline U32x16 bit_or(U32x16 a, U32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline U32x16 bit_xor(U32x16 a, U32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
inline U32x16 shl(U32x16 a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
inline U32x16 shr(U32x16 a) {
  return {_mm512_srli_epi32(a.v, n)};
}
template <int n>
inline U32x16 sar(U32x16 a) {
  return {_mm512_srai_epi32(a.v, n)};
}
inline U32x16 min_s32(U32x16 a, U32x16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline U32x16 max_s32(U32x16 a, U32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline U32x16 to_s32(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F32x16 from_s32(U32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }

inline Mask16 gt(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask16 ge(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask16 eq(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask16 is_nan(F32x16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask16 eq(U32x16 a, U32x16 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
inline Mask16 gt_s32(U32x16 a, U32x16 b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
inline Mask16 first_n(int n) { return {lanes_below(n)}; }
inline Mask16 mask_and(Mask16 a, Mask16 b) { return {__mmask16(a.v & b.v)}; }
inline Mask16 mask_or(Mask16 a, Mask16 b) { return {__mmask16(a.v | b.v)}; }
inline Mask16 mask_not(Mask16 a) { return {__mmask16(~a.v)}; }
inline uint32_t mask_bits(Mask16 a) { return a.v; }
inline F32x16 select(Mask16 m, F32x16 a, F32x16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
inline U32x16 select(Mask16 m, U32x16 a, U32x16 b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

inline F32x16 load_bf16(const uint16_t* p) { return as_float(shl<16>(load_u16(p))); }
inline F32x16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline __attribute__((always_inline)) void store_bf16(uint16_t* p, F32x16 a) {
  const U32x16 u = bits(a);
  const U32x16 odd = bit_and(shr<16>(u), set1_u32(1));
  const U32x16 rounded = shr<16>(add(add(u, set1_u32(0x7fff)), odd));
  store_u16(p, select(is_nan(a), set1_u32(0x7fc0), rounded));
}
inline void store_f16(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// Packed weight codes; see scalar.h.
template <int pair>
inline void decode_e2m1(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const __m512 value = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f,
                                      -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  // Words of four nibbles k0 k2 k1 k3; their order n0-3 n8-11 n4-7 n12-15 is undone by the permute.
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0xd8);
  const __m512i v = _mm512_cvtepu16_epi32(words);  // VPERMPS looks at the low four bits only
  k0.v = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * pair), value);
  k1.v = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * pair + 8), value);
}
// E4M3 codes in the high bytes of words -> fp16 of value / 256.
inline __m256i e4m3_to_f16(__m256i v) {
  return _mm256_and_si256(_mm256_srai_epi16(v, 1), _mm256_set1_epi16(short(0xbf80)));
}
inline void decode_e4m3(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  k0.v = _mm512_cvtph_ps(e4m3_to_f16(_mm256_slli_epi16(v, 8)));
  k1.v = _mm512_cvtph_ps(e4m3_to_f16(v));
}
inline void decode_e5m2(const uint8_t* p, F32x16& k0, F32x16& k1) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  k0.v = _mm512_cvtph_ps(_mm256_slli_epi16(v, 8));
  k1.v = _mm512_cvtph_ps(_mm256_and_si256(v, _mm256_set1_epi16(short(0xff00))));
}
inline F32x16 load_e4m3(const uint8_t* p) {
  const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_cvtph_ps(e4m3_to_f16(_mm256_slli_epi16(v, 8)))};
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
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
// Lanes i + 8.
inline __m256 fold_halves(F32x16 a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
inline void reduce_add4(F32x16 a, F32x16 b, F32x16 c, F32x16 d, float* out, int64_t stride) {
  const __m256 a8 = fold_halves(a), b8 = fold_halves(b), c8 = fold_halves(c), d8 = fold_halves(d);
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
  const __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}
inline uint32_t reduce_max_s32(U32x16 a) {
  const __m256i s8 = _mm256_max_epi32(_mm512_castsi512_si256(a.v), _mm512_extracti32x8_epi32(a.v, 1));
  const __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_max_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(s2, _mm_shuffle_epi32(s2, 0xb1))));
}

}  // namespace
}  // namespace moesaic
