#pragma once
// Rows of 16-bit values: 16-byte accesses of 8 values, sums and maxima over a block, quantized stores.
#include "fp8/divide.cuh"

enum { QUANT_NONE = 0, QUANT_STATIC = 1, QUANT_PER_TOKEN = 2, QUANT_BLOCK = 3 };

template <int Dtype> DEVICE void unpack8(uint4 v, float (&x)[8]) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = to_float<Dtype>((u16)words[i]);
    x[2 * i + 1] = to_float<Dtype>((u16)(words[i] >> 16));
  }
}
template <int Dtype> DEVICE uint4 pack8(const float (&x)[8]) {
  return make_uint4(from_float2<Dtype>(x[0], x[1]), from_float2<Dtype>(x[2], x[3]), from_float2<Dtype>(x[4], x[5]),
                    from_float2<Dtype>(x[6], x[7]));
}

DEVICE uint2 quantize8(const float (&x)[8], const Divisor& d) {
  return make_uint2(e4m3x4(d.divide(x[0]), d.divide(x[1]), d.divide(x[2]), d.divide(x[3])),
                    e4m3x4(d.divide(x[4]), d.divide(x[5]), d.divide(x[6]), d.divide(x[7])));
}

// The scale of a row from its largest magnitude: max(min(amax, bound) / 448, 1 / (448 * 512)); bound 0 = none.
DEVICE float per_token_scale(float amax, float bound) {
  if (bound > 0) amax = fminf(amax, bound);
  return fmaxf(__fdiv_rn(amax, 448.0f), 1.0f / (448.0f * 512.0f));
}

// The largest magnitude of the 128 values that 16 neighbouring lanes hold, in each of them.
DEVICE float block_amax(const float (&x)[8]) {
  float amax = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; j++) amax = fmaxf(amax, fabsf(x[j]));
#pragma unroll
  for (int d = 8; d; d >>= 1) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  return amax;
}

// (sum of .x, maximum of .y) over the block, in every thread, with one barrier. `scratch` must not be in use: each call
// of a kernel has its own.
template <int Threads> DEVICE float2 block_sum_max(float2 v, float2* scratch) {
  static_assert(Threads % 32 == 0 && Threads <= 1024, "whole warps");
  constexpr int WARPS = Threads / 32;
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    v.x += __shfl_xor_sync(~0u, v.x, d);
    v.y = fmaxf(v.y, __shfl_xor_sync(~0u, v.y, d));
  }
  if (WARPS == 1) return v;
  const int lane = threadIdx.x % 32;
  if (lane == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = scratch[lane % WARPS];
  if (lane >= WARPS) v = make_float2(0.0f, v.y);
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    v.x += __shfl_xor_sync(~0u, v.x, d);
    v.y = fmaxf(v.y, __shfl_xor_sync(~0u, v.y, d));
  }
  return v;
}
