// fp16 and bf16 one value at a time, by integer arithmetic; the definition that the vector loads and
// stores of every instruction set agree with.
#pragma once
#include <cstdint>
#include <cstring>

namespace moesaic {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) {  // Inf, or a NaN made quiet as VCVTPH2PS does
    return bits_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x00400000u : 0));
  }
  if (exponent == 0) return bits_float(float_bits(float(mantissa) * 0x1p-24f) | sign);
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00 | ((a >> 13) & 0x3ff));  // NaN: quiet, payload kept
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00);                       // rounds past 65504: Inf
  if (a < 0x38800000u) {  // subnormal: adding 0.5 aligns the mantissa to 2^-24 and rounds
    const float shifted = bits_float(a) + 0.5f;
    return uint16_t(sign | (float_bits(shifted) - 0x3f000000u));
  }
  return uint16_t(sign | ((a + 0xc8000000u + 0xfff + ((a >> 13) & 1)) >> 13));
}

}  // namespace
}  // namespace moesaic
