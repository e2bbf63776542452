#pragma once
// SwiGLU and the division by an output scale, without the branches of division's special cases.
#include "fp8/types.cuh"

// silu(gate) * up. A gate below -87 gives 0.
DEVICE float swiglu(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

// h / scale rounded to nearest as __fdiv_rn does, by Markstein's two corrections of h * (1 / scale), a third of its
// instructions. Past the range of e4m3 (and for inf, where the residual is NaN) the uncorrected quotient saturates as well.
DEVICE float quotient(float h, float scale, float reciprocal) {
  float q = h * reciprocal;
  float better = __fmaf_rn(__fmaf_rn(-q, scale, h), reciprocal, q);
  better = __fmaf_rn(__fmaf_rn(-better, scale, h), reciprocal, better);
  return fabsf(q) < 512.f ? better : q;
}
