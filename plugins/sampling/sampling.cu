// Greedy or Gumbel-max sampling. blockIdx.y is the row; its columns are split over gridDim.x blocks. Each block finds its
// best (score, lowest column) as one ordered 64-bit key; atomicMax joins the blocks, and the last to arrive writes the
// token and leaves the workspace at zero for the next launch.
// Constants: VOCABULARY, THREADS.
#include "fp8/sync.cuh"

#define MINUS_INFINITY __int_as_float(0xFF800000)
struct Workspace { u64 best; u32 arrived; u32 unused; };

DEVICE void philox(u32 (&c)[4], u32 k0, u32 k1) {  // Philox4x32-10, Salmon et al. 2011
#pragma unroll
  for (int i = 0; i < 10; i++) {
    const u64 p0 = (u64)c[0] * 0xD2511F53u, p1 = (u64)c[2] * 0xCD9E8D57u;
    c[0] = (u32)(p1 >> 32) ^ c[1] ^ k0;
    c[1] = (u32)p1;
    c[2] = (u32)(p0 >> 32) ^ c[3] ^ k1;
    c[3] = (u32)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

DEVICE float uniform(u32 word) { return (float)word * 0x1p-32f + 0x1p-33f; }
// Not inlined: it is seldom called, and the cold instruction cache is what a short launch waits for.
static __device__ __noinline__ float noisy_score(float logit, float hot, u32 word) {
  return __fdiv_rn(logit, hot) - logf(-log1pf(-uniform(word)));
}
// At least noisy_score, for -log(-log(1 - u)) <= -log(u); the slack covers the roundings. NaN where it does not know.
DEVICE float bound(float logit, float reciprocal, u32 word) {
  const float x = logit * reciprocal;
  return fmaxf(x * 0.999999f, x * 1.000001f) + (1e-4f - __logf(uniform(word)));
}

// Larger for the larger score, then for the lower column; never 0.
DEVICE u64 key(float score, u32 column) {
  const u32 bits = __float_as_uint(score + 0.0f);  // -0 + 0 = +0: they are equal
  const u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (u64)ordered << 32 | (u32)~column;
}
DEVICE u64 larger(u64 a, u64 b) { return a > b ? a : b; }

DEVICE void load_quad(const float* row, int quad, float (&v)[4]) {
  if (VOCABULARY % 4 == 0) {
    const float4 f = ((const float4*)row)[quad];
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  } else {  // rows are not 16-byte aligned
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = 4 * quad + j < VOCABULARY ? row[4 * quad + j] : MINUS_INFINITY;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
sampling(const float* logits, const float* temperature, const long long* seed, const int* counter, int* token,
         Workspace* workspace) {
  __shared__ u64 scratch[THREADS / 32];
  constexpr int QUADS = (VOCABULARY + 3) / 4, UNROLL = 4;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int row = blockIdx.y;
  const float hot = temperature[row];
  const u64 bits = (u64)seed[row];
  const u32 step = counter ? (u32)counter[row] : 0u;
  const float reciprocal = __frcp_rn(hot);

  float top = MINUS_INFINITY;  // a NaN is never larger, and a row without any number above -inf gives column 0
  u32 column = 0;
  for (int start = blockIdx.x * THREADS + threadIdx.x; start < QUADS; start += UNROLL * gridDim.x * THREADS) {
    float v[UNROLL][4];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const int quad = start + i * gridDim.x * THREADS;
      if (quad < QUADS) load_quad(logits + (u64)row * VOCABULARY, quad, v[i]);
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const u32 quad = start + i * gridDim.x * THREADS;
      if (quad >= QUADS) break;
      u32 words[4] = {quad, 0u, step, 0u};
      if (hot > 0) philox(words, (u32)bits, (u32)(bits >> 32));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float score = v[i][j];
        if (hot > 0) {
          if (bound(score, reciprocal, words[j]) <= top) continue;
          score = noisy_score(score, hot, words[j]);
        }
        if (score > top) top = score, column = 4 * quad + j;
      }
    }
  }
  u64 best = key(top, column);
#pragma unroll
  for (int d = 16; d; d >>= 1) best = larger(best, __shfl_xor_sync(~0u, best, d));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x) return;
#pragma unroll
  for (int i = 1; i < THREADS / 32; i++) best = larger(best, scratch[i]);
  if (gridDim.x > 1) {
    atomicMax(&workspace[row].best, best);
    __threadfence();
    if (atomicAdd(&workspace[row].arrived, 1) + 1 < gridDim.x) return;
    __threadfence();
    best = atomicExch(&workspace[row].best, 0);
    workspace[row].arrived = 0;
  }
  token[row] = (int)~(u32)best;
}
