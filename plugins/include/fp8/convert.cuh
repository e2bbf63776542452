#pragma once
// Conversions: float32 <-> e4m3 (round to nearest even, saturating at 448, NaN stays NaN), bf16, f16.
#include "fp8/types.cuh"

// x, its magnitude `most` at most.
DEVICE float clamp_magnitude(float x, float most) {
  float r;
  asm("min.xorsign.abs.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(most));
  return r;
}

// Two floats to two e4m3 codes, the first in the low byte.
DEVICE u16 e4m3x2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 e4m3x4(float a, float b, float c, float d) { return (u32)e4m3x2(a, b) | ((u32)e4m3x2(c, d) << 16); }

// The model's 16-bit type is a template argument, a kernel's constant DTYPE: 0 = bf16, 1 = f16.
template <int Dtype> DEVICE float to_float(u16 x) {
  float r;
  if (Dtype == 0) r = __uint_as_float((u32)x << 16);
  else asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
template <int Dtype> DEVICE u16 from_float(float x) {
  u16 r;
  if (Dtype == 0) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
// Two floats packed, the first in the low half.
template <int Dtype> DEVICE u32 from_float2(float low, float high) {
  u32 r;
  if (Dtype == 0) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <int Dtype> DEVICE void round_pair(float& a, float& b) {
  u32 packed = from_float2<Dtype>(a, b);
  a = to_float<Dtype>((u16)packed), b = to_float<Dtype>((u16)(packed >> 16));
}

// e4m3 codes to f16, the lowest byte first; exact.
DEVICE u32 e4m3x2_to_f16(u16 codes) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(codes));
  return r;
}
DEVICE void e4m3x4_to_f16(u32 codes, u32& low, u32& high) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}" : "=r"(low), "=r"(high) : "r"(codes));
}
// To floats.
DEVICE void e4m3x4_to_float(u32 codes, float (&x)[4]) {
  u32 low, high;
  e4m3x4_to_f16(codes, low, high);
  x[0] = to_float<1>((u16)low), x[1] = to_float<1>((u16)(low >> 16));
  x[2] = to_float<1>((u16)high), x[3] = to_float<1>((u16)(high >> 16));
}
