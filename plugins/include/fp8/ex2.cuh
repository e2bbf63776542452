#pragma once
// ex2.approx: 2^x by the special-function unit, relative error 2^-22, denormal results flushed to zero.
#include "fp8/types.cuh"

DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
