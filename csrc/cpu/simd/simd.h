// The vector vocabulary: 16 fp32 lanes (F32x16), 16 32-bit integer lanes (U32x16) and a lane mask
// (Mask16), with the same names and the same bits on every instruction set.  On AVX2 a vector is two
// registers, on AVX-512 one, on NEON four, in the scalar unit an array.
//
// Rules that make the bits equal: fma(a, b, c) = a * b + c with one rounding and nothing else is ever
// fused; min/max return the second operand if either is NaN; reduce_add folds lane i with i + 8, then
// i + 4, i + 2, i + 1; conversions round to nearest even; a NaN becomes 0x7fc0 in bf16.
//
// Algorithms are written once against this file, in *.simd.cc, and compiled once per set.  Everything
// is in an anonymous namespace: a copy compiled for AVX-512 must never be merged with another's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if MOESAIC_ISA_AVX512
#include "avx512.h"
#elif MOESAIC_ISA_AVX2
#include "avx2.h"
#elif MOESAIC_ISA_NEON
#include "neon.h"
#else
#include "scalar.h"
#endif

#include "elementary.h"
