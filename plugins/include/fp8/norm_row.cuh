#pragma once
// The norm of a row that a block holds in registers, and its rounding or quantization. RMSNorm takes one reduction: the sum
// of squares and max|x w| go together, for amax(x w r) = r max|x w|.
// Constants: HIDDEN, THREADS, DTYPE, LAYER_NORM, BIAS, EPSILON, QUANT, SCALE_UB, RESIDUAL, GATHER.
#include "fp8/rows.cuh"

constexpr int VECTORS = HIDDEN / 8;
constexpr int HELD = (VECTORS + THREADS - 1) / THREADS;
static_assert(HIDDEN % 8 == 0, "rows are whole 16-byte units");
static_assert(QUANT != QUANT_BLOCK || HIDDEN % 128 == 0, "a block of 128 values is 16 neighbouring lanes");

DEVICE int column(int i) { return i * THREADS + threadIdx.x; }
DEVICE bool inside(int i) { return VECTORS % THREADS == 0 || column(i) < VECTORS; }

// What is known before the row is.
struct Stored {
  uint4 w[HELD] = {}, b[HELD] = {};
  float scale;
  DEVICE_MEMBER Stored(const uint4* weight, const uint4* bias, const float* static_scale) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      if (!inside(i)) continue;
      w[i] = weight[column(i)];
      if (BIAS) b[i] = bias[column(i)];
    }
    scale = QUANT == QUANT_STATIC ? *static_scale : 1.0f;
  }
};

// `raw` is the row, `added` the residual's; the sum goes to `source` of residual_out, in units, unless rows are gathered.
DEVICE void norm_row(const Stored& stored, const uint4 (&raw)[HELD], const uint4 (&added)[HELD], u64 source, void* y,
                     float* y_scale, uint4* residual_out) {
  __shared__ float2 scratch[2][32];
  float h[HELD][8];
  float2 total = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    float gain[8], other[8];
    unpack8<DTYPE>(raw[i], h[i]);
    unpack8<DTYPE>(stored.w[i], gain);
    if (RESIDUAL) {
      unpack8<DTYPE>(added[i], other);
#pragma unroll
      for (int j = 0; j < 8; j++) h[i][j] += other[j];
      const uint4 sum = pack8<DTYPE>(h[i]);
      if (!GATHER && inside(i)) residual_out[source + column(i)] = sum;
      unpack8<DTYPE>(sum, h[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      total.x += LAYER_NORM ? h[i][j] : h[i][j] * h[i][j];
      if (!LAYER_NORM) total.y = fmaxf(total.y, fabsf(h[i][j] * gain[j]));
    }
  }
  total = block_sum_max<THREADS>(total, scratch[0]);

  float mean = 0.0f;
  if (LAYER_NORM) {
    mean = total.x / HIDDEN;
    float2 squares = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (inside(i)) squares.x += (h[i][j] - mean) * (h[i][j] - mean);
    total.x = block_sum_max<THREADS>(squares, scratch[1]).x;
  }
  const float inverse = __frcp_rn(__fsqrt_rn(total.x / HIDDEN + (float)EPSILON));

  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    float gain[8], shift[8];
    unpack8<DTYPE>(stored.w[i], gain);
    unpack8<DTYPE>(stored.b[i], shift);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      h[i][j] = (h[i][j] - mean) * inverse * gain[j] + shift[j];
      amax = fmaxf(amax, fabsf(h[i][j]));
    }
  }
  if (QUANT == QUANT_PER_TOKEN) {
    __shared__ float2 maxima[32];
    amax = LAYER_NORM ? block_sum_max<THREADS>({0.0f, amax}, maxima).y : total.y * inverse;
  }
  const float s = QUANT == QUANT_PER_TOKEN ? per_token_scale(amax, (float)SCALE_UB) : stored.scale;
  const Divisor divisor(s);
  const u64 target = (u64)blockIdx.x * VECTORS;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const float own = QUANT == QUANT_BLOCK ? per_token_scale(block_amax(h[i]), 0.0f) : 1.0f;
    if (!inside(i)) continue;
    if (QUANT == QUANT_NONE) ((uint4*)y)[target + column(i)] = pack8<DTYPE>(h[i]);
    else ((uint2*)y)[target + column(i)] = quantize8(h[i], QUANT == QUANT_BLOCK ? Divisor(own) : divisor);
    if (QUANT == QUANT_BLOCK && column(i) % 16 == 0) y_scale[(target + column(i)) / 16] = own;
  }
  if (QUANT == QUANT_PER_TOKEN && threadIdx.x == 0) y_scale[blockIdx.x] = s;
}
