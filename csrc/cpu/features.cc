// Compiled at the ABI baseline and never with an instruction set's flags: a probe that the compiler
// may fill with the very instructions it probes for is worthless.
#include "cpu/features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>

namespace moesaic {
namespace {

// XCR0 says which register state the operating system saves: bits 1-2 SSE/AVX, bits 5-7 AVX-512.
uint64_t xcr0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}

struct Leaves {
  uint32_t c1 = 0, b7 = 0, c7 = 0;
  uint64_t state = 0;
  Leaves() {
    uint32_t a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) c1 = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) b7 = b, c7 = c;
    if (c1 & (1u << 27)) state = xcr0();  // OSXSAVE
  }
};

const Leaves& leaves() {
  static const Leaves value;
  return value;
}

constexpr uint32_t bit(int i) { return 1u << i; }
bool all(uint32_t word, uint32_t mask) { return (word & mask) == mask; }

}  // namespace

bool cpu_has_avx2() {
  const Leaves& l = leaves();
  return (l.state & 0x6) == 0x6 && all(l.c1, bit(12) /*FMA*/ | bit(28) /*AVX*/ | bit(29) /*F16C*/) &&
         all(l.b7, bit(5) /*AVX2*/);
}

bool cpu_has_avx512() {
  const Leaves& l = leaves();
  return cpu_has_avx2() && (l.state & 0xe6) == 0xe6 &&
         all(l.b7, bit(16) /*F*/ | bit(17) /*DQ*/ | bit(30) /*BW*/ | bit(31) /*VL*/) &&
         all(l.c7, bit(11) /*VNNI*/);
}

bool cpu_has_neon() { return false; }

}  // namespace moesaic

#else

namespace moesaic {

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_neon() {
#if defined(__aarch64__)
  return true;  // part of the AArch64 baseline
#else
  return false;
#endif
}

}  // namespace moesaic

#endif
