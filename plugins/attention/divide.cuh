#pragma once
// Division by a scale that many values share, for quantization: the quotient rounded as by IEEE division, at a third of
// its instructions. The reciprocal is correctly rounded and the remainder exact, so one correction rounds correctly
// (Markstein, IBM J. Res. Dev. 34, 1990). Quotients beyond e4m3's range stay beyond it; NaN stays NaN.
#include "fp8/types.cuh"

struct Divisor { float scale, reciprocal; };

DEVICE Divisor divisor(float scale) { return {scale, __frcp_rn(scale)}; }
DEVICE float divide(float x, Divisor d) {
  float q;  // x * reciprocal, at most 512 in magnitude: an infinite product would have no remainder
  asm("min.xorsign.abs.f32 %0, %1, 0f44000000;" : "=f"(q) : "f"(x * d.reciprocal));
  return fmaf(fmaf(-q, d.scale, x), d.reciprocal, q);
}
