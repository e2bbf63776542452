#pragma once
// PROMOTE: products of one k block, scaled, into float32 sums.
#include "fp8/sync.cuh"
#include "gemm_shape.cuh"

// BLOCKWISE scales of a k block, for this thread's two rows: times those of its columns (COLUMNS), or alone beside where the
// columns' are in shared memory.
struct Scales {
  float row[COLUMNS ? COLUMNS : 1][2];
  const float* columns;
};

// sum += d, which BLOCKWISE scales.
DEVICE void promote(float (&sum)[BLOCK_N / 2], const float (&d)[BLOCK_N / 2], const Scales& scale) {
  float one = 1.f;
  pin(one);  // known only here: no addition comes before the products that follow are under way
#pragma unroll
  for (int g = 0; g < BLOCK_N / 8; g++) {
    float column = BLOCKWISE && !COLUMNS ? scale.columns[g * SCALE_VECTOR] : one;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float row = scale.row[COLUMNS ? g * 8 / SHARED_N : 0][i / 2];
      sum[4 * g + i] = fmaf(d[4 * g + i], COLUMNS ? row : BLOCKWISE ? row * column : column, sum[4 * g + i]);
    }
  }
}
