#pragma once
// Units of 16 bytes of any type, the last of an array possibly cut short.
// Constants: DTYPE (0 = bf16, 1 = f16, 2 = f32), MAXIMUM.
#include "fp8/rows.cuh"

constexpr int UNIT_VALUES = DTYPE == 2 ? 4 : 8;

DEVICE uint4 load_unit(const u8* x, u64 offset, u64 bytes) {
  if (offset + 16 <= bytes) return *(const uint4*)(x + offset);
  uint4 v = {0, 0, 0, 0};
  for (int i = 0; i < 8; i++)  // a type has two bytes or four
    if (offset + 2 * i < bytes) ((u16*)&v)[i] = *(const u16*)(x + offset + 2 * i);
  return v;
}
DEVICE void store_unit(u8* y, u64 offset, u64 bytes, uint4 v) {
  if (offset + 16 <= bytes) *(uint4*)(y + offset) = v;
  else
    for (int i = 0; i < 8; i++)
      if (offset + 2 * i < bytes) *(u16*)(y + offset + 2 * i) = (u16)((&v.x)[i / 2] >> (16 * (i % 2)));
}

// Of 16-bit types, and of float32.
DEVICE void unpack_unit(uint4 v, float (&x)[8]) { unpack8<DTYPE>(v, x); }
DEVICE void unpack_unit(uint4 v, float (&x)[4]) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
DEVICE uint4 pack_unit(const float (&x)[8]) { return pack8<DTYPE>(x); }
DEVICE uint4 pack_unit(const float (&x)[4]) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
DEVICE float combine(float a, float b) {
  if (MAXIMUM) return a > b || a != a ? a : b;
  return __fadd_rn(a, b);
}
