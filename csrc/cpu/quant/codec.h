// Codes of the narrow element types <-> fp32, 16 lanes at a time, and the arithmetic of block scales.
#pragma once
#include "cpu/simd/simd.h"
#include "moesaic/quant.h"

namespace moesaic {
namespace {

// bits and mantissa bits of a code, bias of its exponent, largest finite value, and the NaN that
// quantizing writes (-1: the type has none).
template <Element e>
struct ElementTraits;
template <>
struct ElementTraits<Element::kE4M3FN> {
  static constexpr int bits = 8, mantissa = 3, bias = 7, nan = 0x7f;
  static constexpr float max = 448.0f;
};
template <>
struct ElementTraits<Element::kE5M2> {
  static constexpr int bits = 8, mantissa = 2, bias = 15, nan = 0x7f;
  static constexpr float max = 57344.0f;
};
template <>
struct ElementTraits<Element::kE4M3FNUZ> {
  static constexpr int bits = 8, mantissa = 3, bias = 8, nan = 0x80;
  static constexpr float max = 240.0f;
};
template <>
struct ElementTraits<Element::kE5M2FNUZ> {
  static constexpr int bits = 8, mantissa = 2, bias = 16, nan = 0x80;
  static constexpr float max = 57344.0f;
};
template <>
struct ElementTraits<Element::kE2M1> {
  static constexpr int bits = 4, mantissa = 1, bias = 1, nan = -1;
  static constexpr float max = 6.0f;
};
template <>
struct ElementTraits<Element::kE2M3> {
  static constexpr int bits = 6, mantissa = 3, bias = 1, nan = -1;
  static constexpr float max = 7.5f;
};
template <>
struct ElementTraits<Element::kE3M2> {
  static constexpr int bits = 6, mantissa = 2, bias = 3, nan = -1;
  static constexpr float max = 28.0f;
};
template <>
struct ElementTraits<Element::kInt8> {
  static constexpr int bits = 8, mantissa = 6, bias = 0, nan = -1;
  static constexpr float max = 127.0f;
};

// Vectors must stay in registers: a call would pass them through memory.
#define MOESAIC_ALWAYS_INLINE inline __attribute__((always_inline))

constexpr bool is_fnuz(Element e) { return e == Element::kE4M3FNUZ || e == Element::kE5M2FNUZ; }

// The MX specification reads INT8 as a fixed-point number with 6 fraction bits.
inline float code_unit(const BlockFormat& f) {
  return f.element == Element::kInt8 && f.scale_type == ScaleType::kE8M0 ? 0x1p-6f : 1.0f;
}

// Codes (one a lane) of q, clamped and rounded to nearest even.  A magnitude in [2^e, 2^(e+1)) is a
// whole number of steps of 2^(e - mantissa); adding 2^(e + 23 - mantissa) leaves that number, rounded,
// in the low bits of the sum.  Codes of one sign are consecutive, so code = (e - min e) * 2^mantissa +
// steps, also for subnormals (e = min e) and when rounding reaches the next power of two.
// `checked` gives NaN its code (or 0); without it no lane may be NaN.
template <Element e, bool checked>
MOESAIC_ALWAYS_INLINE U32x16 encode(F32x16 q) {
  using T = ElementTraits<e>;
  if constexpr (e == Element::kInt8) {
    if constexpr (checked) q = select(is_nan(q), zero(), q);
    q = max(min(q, set1(T::max)), set1(-T::max));
    return bit_and(to_s32(q), set1_u32(0xff));
  } else {
    constexpr uint32_t min_exponent = uint32_t(128 - T::bias) << 23;
    constexpr int drop = 23 - T::mantissa;
    const F32x16 a = min(as_float(bit_and(bits(q), set1_u32(0x7fffffff))), set1(T::max));
    const U32x16 exponent = max_s32(bit_and(bits(a), set1_u32(0x7f800000)), set1_u32(min_exponent));
    const U32x16 magic = add(exponent, set1_u32(uint32_t(drop) << 23));
    const U32x16 steps = sub(bits(add(a, as_float(magic))), magic);
    U32x16 code = add(steps, sub(shr<drop>(exponent), set1_u32(min_exponent >> drop)));
    const U32x16 sign = bit_and(shr<32 - T::bits>(bits(q)), set1_u32(1u << (T::bits - 1)));
    if constexpr (is_fnuz(e)) {  // no negative zero: that code is the NaN
      code = select(eq(code, set1_u32(0)), code, bit_or(code, sign));
    } else {
      code = bit_or(code, sign);
    }
    if constexpr (checked) code = select(is_nan(q), set1_u32(T::nan < 0 ? 0 : T::nan), code);
    return code;
  }
}

// Values of codes (one a lane, higher bits zero), before any scale.
template <Element e>
MOESAIC_ALWAYS_INLINE F32x16 decode(U32x16 code) {
  using T = ElementTraits<e>;
  if constexpr (e == Element::kInt8) {
    return from_s32(sar<24>(shl<24>(code)));
  } else {
    constexpr int drop = 23 - T::mantissa;
    const float step = bits_float(uint32_t(128 - T::bias - T::mantissa) << 23);  // of subnormals
    const U32x16 magnitude = bit_and(code, set1_u32((1u << (T::bits - 1)) - 1));
    const U32x16 normal = add(shl<drop>(magnitude), set1_u32(uint32_t(127 - T::bias) << 23));
    const U32x16 subnormal = bits(mul(from_s32(magnitude), set1(step)));
    const Mask16 is_subnormal = gt_s32(set1_u32(1u << T::mantissa), magnitude);
    U32x16 value = select(is_subnormal, subnormal, normal);
    value = bit_or(value, shl<32 - T::bits>(bit_and(code, set1_u32(1u << (T::bits - 1)))));
    const U32x16 nan = set1_u32(0x7fc00000);
    if constexpr (e == Element::kE4M3FN) value = select(eq(magnitude, set1_u32(0x7f)), nan, value);
    if constexpr (e == Element::kE5M2) {  // exponent 31: Inf and NaN, as in IEEE
      const U32x16 special = bit_or(value, set1_u32(0x7f800000));
      value = select(gt_s32(magnitude, set1_u32(0x7b)), special, value);
    }
    if constexpr (is_fnuz(e)) value = select(eq(code, set1_u32(0x80)), nan, value);
    return as_float(value);
  }
}

inline float e8m0_to_float(uint8_t code) {
  if (code == 255) return bits_float(0x7fc00000);
  return bits_float(code ? uint32_t(code) << 23 : 0x00400000u);  // 2^-127 is a subnormal
}

// E4M3 scales one at a time, by the arithmetic of encode and decode; x in [2^-9, 448].
inline uint8_t float_to_e4m3_scale(float x) {
  constexpr uint32_t min_exponent = 121u << 23;
  const uint32_t own = float_bits(x) & 0x7f800000;
  const uint32_t exponent = own < min_exponent ? min_exponent : own;
  const uint32_t magic = exponent + (20u << 23);
  return uint8_t(float_bits(x + bits_float(magic)) - magic + ((exponent - min_exponent) >> 20));
}

inline float e4m3_scale_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7f;
  float value = magnitude == 0x7f ? bits_float(0x7fc00000)
                : magnitude < 8   ? float(magnitude) * 0x1p-9f
                                  : bits_float((magnitude << 20) + (120u << 23));
  return code & 0x80 ? -value : value;
}

inline float load_scale(const BlockFormat& f, const void* scale, int64_t i) {
  switch (f.scale_type) {
    case ScaleType::kE8M0: return e8m0_to_float(static_cast<const uint8_t*>(scale)[i]);
    case ScaleType::kE4M3: return e4m3_scale_to_float(static_cast<const uint8_t*>(scale)[i]);
    default: return static_cast<const float*>(scale)[i];
  }
}

inline void store_nan_scale(const BlockFormat& f, void* scale, int64_t i) {
  switch (f.scale_type) {
    case ScaleType::kE8M0: static_cast<uint8_t*>(scale)[i] = 0xff; break;
    case ScaleType::kE4M3: static_cast<uint8_t*>(scale)[i] = 0x7f; break;
    default: static_cast<float*>(scale)[i] = bits_float(0x7fc00000);
  }
}

// Store the scale of a block with this amax and return the multiplier that was stored.
template <Element e>
inline float make_scale(const BlockFormat& f, float amax, const float* global, void* scale, int64_t i) {
  using T = ElementTraits<e>;
  const float max = T::max * code_unit(f);
  if (f.rule != ScaleRule::kExact) {
    const uint32_t fraction = 0x7fffff, max_bits = float_bits(max);
    const uint32_t addend = f.rule == ScaleRule::kFloor   ? 0
                            : f.rule == ScaleRule::kEven  ? 1u << (22 - T::mantissa)
                            : f.rule == ScaleRule::kRceil ? fraction - (max_bits & fraction)
                                                          : fraction;
    const int32_t emax = int32_t(max_bits >> 23) - 127;
    int32_t code = int32_t((float_bits(amax) + addend) >> 23) - emax;
    code = code < 0 ? 0 : code > 254 ? 254 : code;
    if (amax == 0.0f) code = 127;
    const float value = e8m0_to_float(uint8_t(code));
    if (f.scale_type == ScaleType::kE8M0)
      static_cast<uint8_t*>(scale)[i] = uint8_t(code);
    else
      static_cast<float*>(scale)[i] = value;
    return value;
  }
  float value = amax / max;
  if (f.scale_type == ScaleType::kFloat32) {
    if (value < 0x1p-126f) value = amax == 0.0f ? 1.0f : 0x1p-126f;
    static_cast<float*>(scale)[i] = value;
    return value;
  }
  if (global) value = value / *global;
  value = amax == 0.0f ? 1.0f : value < 0x1p-9f ? 0x1p-9f : value > 448.0f ? 448.0f : value;
  const uint8_t code = float_to_e4m3_scale(value);
  static_cast<uint8_t*>(scale)[i] = code;
  return e4m3_scale_to_float(code);
}

}  // namespace
}  // namespace moesaic
