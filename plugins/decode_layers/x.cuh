#pragma once
// A linear's x: it is taken from the words of the other blocks, normed if need be, and laid out for wgmma: K bytes, one
// behind the other. Of the eight columns that wgmma takes at least the others begin 16 bytes further each; they are not used.
#include "fp8/rows.cuh"
#include "sums.cuh"

template <int K> DEVICE void codes_to_x(u8* x, const u32* words, u32 tag) {
  constexpr int COUNT = K / 8, HELD = (COUNT + CONSUMERS - 1) / CONSUMERS;
  uint4 v[HELD];
  receive<COUNT>(v, words, tag);
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int at = threadIdx.x + i * CONSUMERS;
    if (at < COUNT) ((uint2*)x)[at] = make_uint2(__byte_perm(v[i].x, v[i].y, 0x5410), __byte_perm(v[i].z, v[i].w, 0x5410));
  }
}

// RMSNorm of the sums, quantized. `sums(v, tag)` awaits them.
template <typename Sums> NORM void norm_to_x(u8* x, float* scratch, Sums sums, const u16* gain, float scale, u32 tag) {
  constexpr int COUNT = HIDDEN / 4, HELD = (COUNT + CONSUMERS - 1) / CONSUMERS;
  uint2 g[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if ((int)threadIdx.x + i * CONSUMERS < COUNT) g[i] = ((const uint2*)gain)[threadIdx.x + i * CONSUMERS];
  const Divisor divisor(scale);
  uint4 v[HELD];
  sums(v, tag);
  float squares = 0.f;
  const auto value = [](u32 word) { return to_float<DTYPE>((u16)word); };
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    if ((int)threadIdx.x + i * CONSUMERS >= COUNT) continue;
    const float a = value(v[i].x), b = value(v[i].y), c = value(v[i].z), d = value(v[i].w);
    squares += a * a + b * b + c * c + d * d;
  }
#pragma unroll
  for (int i = 16; i; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = squares;
  barrier_sync(EVERY, CONSUMERS);
  squares = 0.f;
#pragma unroll
  for (int i = 0; i < CONSUMERS / 32; i++) squares += scratch[i];
  const float inverse = __frcp_rn(__fsqrt_rn(squares / HIDDEN + (float)EPSILON));
  const auto quantized = [&](u32 word, u32 weight) { return divisor.divide(value(word) * inverse * value(weight)); };
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int at = threadIdx.x + i * CONSUMERS;
    if (at < COUNT) ((u32*)x)[at] = e4m3x4(quantized(v[i].x, g[i].x), quantized(v[i].y, g[i].x >> 16), quantized(v[i].z, g[i].y), quantized(v[i].w, g[i].y >> 16));
  }
}
