// Which instruction sets the machine runs, as the CPU *and* the operating system allow.
#pragma once

namespace moesaic {

bool cpu_has_avx2();    // AVX2 + FMA + F16C
bool cpu_has_avx512();  // F + BW + VL + DQ + VNNI
bool cpu_has_neon();

}  // namespace moesaic
