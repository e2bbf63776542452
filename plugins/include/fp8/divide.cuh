#pragma once
// Division by a scale that many values share, for quantization: the quotient is IEEE's wherever its e4m3 code depends on
// it, at a third of the instructions. The reciprocal is correctly rounded and the remainder exact, so one correction rounds
// correctly (Markstein, IBM J. Res. Dev. 34, 1990; tests/test_divide.py). Quotients beyond e4m3's range stay beyond it, and
// NaN stays NaN. The remainder is taken negative: so a quotient of -0 stays one.
#include "fp8/convert.cuh"

// x / scale, of a scale between 2^-90 and 2^126, whose remainders and reciprocal float32 can hold.
DEVICE float quotient(float x, float scale, float reciprocal) {
  const float q = clamp_magnitude(x * reciprocal, 512.f);  // an infinite product would have no remainder
  return fmaf(-fmaf(q, scale, -x), reciprocal, q);
}
struct MiddleDivisor {  // of such a scale
  float scale, reciprocal;
  DEVICE_MEMBER explicit MiddleDivisor(float s) : scale(s), reciprocal(__frcp_rn(s)) {}
  DEVICE_MEMBER float divide(float x) const { return quotient(x, scale, reciprocal); }
};

// Of any scale: those near the ends of float32's range are brought into the middle by a power of two, which is exact. With
// a clamp, as above, instead of the choice at the end, decode_layers.cu took 0.8% longer (2 layers of the 8B shape).
struct Divisor {
  float scale, reciprocal, factor;
  DEVICE_MEMBER explicit Divisor(float s) {
    factor = s < 0x1p-60f ? 0x1p60f : s > 0x1p60f ? 0x1p-60f : 1.0f;
    scale = s * factor;
    reciprocal = __frcp_rn(scale);
  }
  DEVICE_MEMBER float divide(float x) const {
    x *= factor;
    const float q = x * reciprocal;
    const float corrected = fmaf(-fmaf(q, scale, -x), reciprocal, q);
    return fabsf(q) < 512.0f ? corrected : q;
  }
};
