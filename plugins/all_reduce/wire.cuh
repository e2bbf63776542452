#pragma once
// Units of 16 bytes on their way: values as they are, or (FP8) as e4m3 with one float32 scale for 128 values. In FP8 a rank
// rounds its own values as the others see them, so that all ranks have the same bits.
// Constants: FP8, DTYPE, MAXIMUM.
#include "values.cuh"

constexpr int VALUES = FP8 ? 16 : UNIT_VALUES;  // of a unit
constexpr int UNIT_BYTES = FP8 ? 32 : 16;       // in x and y
static_assert(!FP8 || (DTYPE != 2 && !MAXIMUM), "sums of 16-bit values travel as e4m3");

struct Wire {
  uint4 data;
  float scale;
};

template <int N> DEVICE Wire encode(const float (&v)[N]) { return {pack_unit(v), 0.0f}; }
DEVICE Wire encode(const float (&v)[16]) {  // eight neighbouring lanes hold 128 values
  float amax = 0.0f;
#pragma unroll
  for (int j = 0; j < 16; j++) amax = fmaxf(amax, fabsf(v[j]));
#pragma unroll
  for (int d = 4; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  const float scale = per_token_scale(amax, 0.0f);
  const Divisor by(scale);
  u32 codes[4];
#pragma unroll
  for (int j = 0; j < 4; j++)
    codes[j] = e4m3x4(by.divide(v[4 * j]), by.divide(v[4 * j + 1]), by.divide(v[4 * j + 2]), by.divide(v[4 * j + 3]));
  return {make_uint4(codes[0], codes[1], codes[2], codes[3]), scale};
}
template <int N> DEVICE void decode(const Wire& w, float (&v)[N]) { unpack_unit(w.data, v); }
DEVICE void decode(const Wire& w, float (&v)[16]) {
  const u32 codes[4] = {w.data.x, w.data.y, w.data.z, w.data.w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float four[4];
    e4m3x4_to_float(codes[j], four);
#pragma unroll
    for (int k = 0; k < 4; k++) v[4 * j + k] = __fmul_rn(four[k], w.scale);
  }
}

// A unit's values, 16 or 32 bytes of x or y; zeros behind the end.
DEVICE Wire read_x(const u8* x, u64 offset, u64 bytes) {
  const uint4 zero = {0, 0, 0, 0};
  const uint4 first = offset < bytes ? *(const uint4*)(x + offset) : zero;
  if (!FP8) return {first, 0.0f};
  const uint4 second = offset < bytes ? *(const uint4*)(x + offset + 16) : zero;
  float v[16], half[8];
  unpack_unit(first, half);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = half[j];
  unpack_unit(second, half);
#pragma unroll
  for (int j = 0; j < 8; j++) v[8 + j] = half[j];
  return encode(v);
}
// `Whole`: the array ends with a whole unit.
template <bool Whole> DEVICE void write_y(u8* y, u64 offset, u64 bytes, const float (&v)[VALUES]) {
#pragma unroll
  for (int h = 0; h < VALUES / UNIT_VALUES; h++) {
    float part[UNIT_VALUES];
#pragma unroll
    for (int j = 0; j < UNIT_VALUES; j++) part[j] = v[UNIT_VALUES * h + j];
    if (offset >= bytes) continue;
    if (Whole) *(uint4*)(y + offset + 16 * h) = pack_unit(part);
    else store_unit(y, offset + 16 * h, bytes, pack_unit(part));
  }
}
