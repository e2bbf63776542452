// y = quantize(activation(x)), of plugins quantize (no activation) and act_quant; of row_amax, the row's amax alone. A block takes THREADS * HELD vectors
// of 8 values of one row (blockIdx.y picks which); per token it takes the whole row, and computes it twice if it is too
// long for the registers (the second reading comes from L2).
// Constants: WIDTH (F or K), THREADS, HELD, DTYPE, ACTIVATION, GATED, QUANT, SCALE_UB.
#include "fp8/rows.cuh"
#include "fp8/sync.cuh"

enum { QUANT_FROM_AMAX = 4, QUANT_AMAX = 5 };  // the scale from a given amax; the amax and nothing else
enum { IDENTITY = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };
constexpr int VECTORS = WIDTH / 8;
constexpr bool KEEP = HELD <= 4;
static_assert(WIDTH % 8 == 0, "rows are whole 16-byte units");
static_assert(QUANT != QUANT_BLOCK || (KEEP && WIDTH % 128 == 0), "a block of 128 values is 16 neighbouring lanes");
constexpr bool WHOLE_ROW = QUANT == QUANT_PER_TOKEN || QUANT == QUANT_AMAX;
static_assert(!WHOLE_ROW || THREADS * HELD >= VECTORS, "a row's scale needs the whole row in one block");

DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
DEVICE float activation(float x) {
  if (ACTIVATION == SILU) return x * sigmoid(x);
  if (ACTIVATION == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  // 0.5 (1 + tanh(u)) = sigmoid(2 u), without its cancellation
  if (ACTIVATION == GELU_TANH) return x * sigmoid(2.0f * 0.79788456f * (x + 0.044715f * x * x * x));
  return x;
}

DEVICE int column(int i) { return (blockIdx.y * HELD + i) * THREADS + threadIdx.x; }
DEVICE bool inside(int i) { return VECTORS % (THREADS * HELD) == 0 || column(i) < VECTORS; }

DEVICE void activate(uint4 raw, uint4 raw_up, float (&h)[8]) {
  float up[8];
  unpack8<DTYPE>(raw, h);
  unpack8<DTYPE>(raw_up, up);
#pragma unroll
  for (int j = 0; j < 8; j++) h[j] = GATED ? activation(h[j]) * up[j] : activation(h[j]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
quantize(const uint4* x, const float* scale, void* y, float* y_scale) {
  __shared__ float2 scratch[32];
  griddepcontrol_launch_dependents();
  float s = QUANT == QUANT_STATIC ? *scale : 1.0f;
  griddepcontrol_wait();

  const uint4* row = x + (u64)blockIdx.x * VECTORS * (GATED ? 2 : 1);
  float h[KEEP ? HELD : 1][8];
  if (KEEP) {
    uint4 raw[HELD], raw_up[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      raw[i] = raw_up[i] = make_uint4(0, 0, 0, 0);
      if (!inside(i)) continue;
      raw[i] = row[column(i)];
      if (GATED) raw_up[i] = row[VECTORS + column(i)];
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) activate(raw[i], raw_up[i], h[KEEP ? i : 0]);
  }

  if (WHOLE_ROW) {
    float amax = 0.0f;
#pragma unroll(KEEP ? HELD : 4)
    for (int i = 0; i < HELD; i++) {
      if (!inside(i)) continue;
      if (!KEEP) activate(row[column(i)], row[GATED ? VECTORS + column(i) : column(i)], h[0]);
#pragma unroll
      for (int j = 0; j < 8; j++) amax = fmaxf(amax, fabsf(h[KEEP ? i : 0][j]));
    }
    amax = block_sum_max<THREADS>({0.0f, amax}, scratch).y;
    if (QUANT == QUANT_AMAX) {
      if (threadIdx.x == 0) ((float*)y)[blockIdx.x] = amax;
      return;
    }
    s = per_token_scale(amax, (float)SCALE_UB);
    if (threadIdx.x == 0) y_scale[blockIdx.x] = s;
  }
  if (QUANT == QUANT_FROM_AMAX) {
    s = per_token_scale(scale[blockIdx.x], (float)SCALE_UB);
    if (threadIdx.x == 0 && blockIdx.y == 0) y_scale[blockIdx.x] = s;
  }

  const Divisor divisor(s);
  const u64 target = (u64)blockIdx.x * VECTORS;
#pragma unroll(KEEP ? HELD : 4)
  for (int i = 0; i < HELD; i++) {
    const float own = QUANT == QUANT_BLOCK ? per_token_scale(block_amax(h[KEEP ? i : 0]), 0.0f) : 1.0f;
    if (!inside(i)) continue;
    if (!KEEP) activate(row[column(i)], row[GATED ? VECTORS + column(i) : column(i)], h[0]);
    if (QUANT == QUANT_NONE) ((uint4*)y)[target + column(i)] = pack8<DTYPE>(h[KEEP ? i : 0]);
    else ((uint2*)y)[target + column(i)] = quantize8(h[KEEP ? i : 0], QUANT == QUANT_BLOCK ? Divisor(own) : divisor);
    if (QUANT == QUANT_BLOCK && column(i) % 16 == 0) y_scale[(target + column(i)) / 16] = own;
  }
}
