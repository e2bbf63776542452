#pragma once
// Division by a scale that many values share, for quantization: the quotient rounded as by IEEE division, at a third of
// its instructions. The reciprocal is correctly rounded and the remainder exact, so one correction rounds correctly
// (Markstein, IBM J. Res. Dev. 34, 1990). Quotients beyond e4m3's range stay beyond it; NaN stays NaN.
#include "fp8/convert.cuh"

struct Divisor { float scale, reciprocal; };

DEVICE Divisor divisor(float scale) { return {scale, __frcp_rn(scale)}; }
DEVICE float divide(float x, Divisor d) {
  const float q = clamp_magnitude(x * d.reciprocal, 512.f);  // an infinite product would have no remainder
  return fmaf(fmaf(-q, d.scale, x), d.reciprocal, q);
}
