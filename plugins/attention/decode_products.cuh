#pragma once
// A tile's products, and a warp's running state.
#include "fp8/convert.cuh"
#include "fp8/ex2.cuh"
#include "fp8/mma.cuh"
#include "decode_shape.cuh"

// Where TMA's swizzle has put 16-byte unit `chunk` of a row of Span bytes, row < 8; the pattern repeats every 8 rows.
template <int Span> DEVICE u32 swizzled(int row, int chunk) {
  return row * Span + ((chunk ^ (Span == 128 ? row : row / 2)) << 4);
}

// d += a b over 32 bytes of a row of the cache: step k of b, and in e4m3 also the step after it. As rows of 16 bytes,
// ldmatrix's matrices hold rows 0-7 and 8-15 of the first half, then of the second.
template <int N> DEVICE void multiply_16(float (&d)[COLUMN_TILES][4], const u32 (&a)[4], const u32 (&b)[COLUMN_TILES][N][2],
                                         int k) {
  if (FP8_CACHE) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 c[4];
      e4m3x4_to_f16(a[2 * half], c[0], c[2]);
      e4m3x4_to_f16(a[2 * half + 1], c[1], c[3]);
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) mma_m16n8k16<OPERAND>(d[n], c, b[n][(k + half) % N][0], b[n][(k + half) % N][1]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) mma_m16n8k16<OPERAND>(d[n], a, b[n][k][0], b[n][k][1]);
  }
}

// s = K Q^T over a tile of keys: rows are tokens, columns heads.
DEVICE void multiply_keys(float (&s)[S_TILES][COLUMN_TILES][4], const u32 (&q)[COLUMN_TILES][STEPS][2], u32 keys) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < S_TILES; j++) {
    __syncwarp();  // keeps the compiler from loading all fragments at once
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) s[j][n][0] = s[j][n][1] = s[j][n][2] = s[j][n][3] = 0.0f;
    const u32 rows = keys + (2 * j + lane / 8 % 2) * 8 * SPAN;
#pragma unroll
    for (int k = 0; k < STEPS; k += 2 / BYTES) {
      const int chunk = k * BYTES + lane / 16;
      u32 a[4];
      ldmatrix_x4(rows + chunk / 8 * TILE * 128 + swizzled<SPAN>(lane % 8, chunk % 8), a);
      multiply_16(s[j], a, q, k);
    }
  }
}

// o^T += V^T P^T over a tile of values. The e4m3 values of 16 tokens lie transposed, the tokens in an order by which 32 bits
// of a row, taken apart, are what a thread needs of tokens 2c, 2c + 1 and 2c + 8, 2c + 9.
DEVICE void multiply_values(float (&o)[O_TILES][COLUMN_TILES][4], const u32 (&p)[COLUMN_TILES][S_TILES][2], u32 values) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < O_TILES; i++) {
    if (i % 2 == 0) __syncwarp();  // as above
#pragma unroll
    for (int k = 0; k < S_TILES; k += 2 / BYTES) {
      u32 a[4];
      if (FP8_CACHE) {
        ldmatrix_x4(values + ((k + lane / 16) * HEAD_DIM + 16 * i + lane % 16) * VALUE_GROUP, a);
      } else {
        const int chunk = 2 * i + lane / 8 % 2;
        const u32 half = chunk / 8 * TILE * 128 + (2 * k + lane / 16) * 8 * 128;
        ldmatrix_x4_trans(values + half + swizzled<128>(lane % 8, chunk % 8), a);
      }
      multiply_16(o[i], a, p, k);
    }
  }
}

// A warp's running state: thread t has heads 2 (t % 4) and the next of every tile of columns, and of the output dimensions
// t / 4 and t / 4 + 8 of every tile of rows; l is the thread's own part of the sum.
struct State {
  float m[COLUMN_TILES][2], l[COLUMN_TILES][2];
  float o[O_TILES][COLUMN_TILES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) {
      m[n][0] = m[n][1] = __int_as_float(0xFF800000);
      l[n][0] = l[n][1] = 0.0f;
#pragma unroll
      for (int i = 0; i < O_TILES; i++) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.0f;
    }
  }

  // Turns scores into p (times 256 for an FP8 cache), as operands of the next product, and rescales the state to the new
  // maximum.
  __device__ __forceinline__ void soften(u32 (&p)[COLUMN_TILES][S_TILES][2], float (&s)[S_TILES][COLUMN_TILES][4],
                                         float scale, int valid) {
    const float NONE = __int_as_float(0xFF800000);
    if (valid < TILE) {
#pragma unroll
      for (int j = 0; j < S_TILES; j++)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (16 * j + threadIdx.x % 32 / 4 + i / 2 * 8 >= valid) s[j][n][i] = NONE;
    }
    float factor[COLUMN_TILES][2];
    bool same = true;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int h = 0; h < PAIR; h++) {
        float top = NONE;
#pragma unroll
        for (int j = 0; j < S_TILES; j++) top = fmaxf(top, fmaxf(s[j][n][h], s[j][n][h + 2]));
#pragma unroll
        for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        const float now = fmaxf(m[n][h], ceilf(top * scale));
        factor[n][h] = exp2f(m[n][h] - now);
        same &= m[n][h] == now;
        m[n][h] = now;
        l[n][h] *= factor[n][h];
        const float shift = (FP8_CACHE ? 8.0f : 0.0f) - now;
#pragma unroll
        for (int j = 0; j < S_TILES; j++)
#pragma unroll
          for (int i = h; i < 4; i += 2) {
            s[j][n][i] = ex2_approx(fmaf(s[j][n][i], scale, shift));
            l[n][h] += s[j][n][i];
          }
      }
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int j = 0; j < S_TILES; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float left = s[j][n][2 * i], right = PAIR > 1 ? s[j][n][2 * i + 1] : 0.0f;
          p[n][j][i] = movmatrix_trans(FP8_CACHE ? e4m3x2_to_f16(e4m3x2(left, right)) : from_float2<OPERAND>(left, right));
        }
    if (!__all_sync(~0u, same)) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int i = 0; i < O_TILES; i++)
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (j % 2 < PAIR) o[i][n][j] *= factor[n][j % 2];
    }
  }
};
