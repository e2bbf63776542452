#pragma once
// The softmax of a tile of scores in wgmma's accumulator layout: thread t of a warp has rows t / 4 and t / 4 + 8, and of each
// 8 columns two, 2 (t % 4) and the next. Its steps are apart because beside wgmma the registers' ports are what is short:
// the exponentials alone run beside it undisturbed, one every 8 clocks, if nothing between them waits for a result.
//
// Constants: FP8_CACHE.
#include "fp8/ex2.cuh"
#include "fp8/sync.cuh"

constexpr int TILE_KV = 128;
constexpr float P_LOG2_SCALE = FP8_CACHE ? 8.f : 0.f;  // P * 256 uses e4m3's range

// Puts the scores' first use behind the wait for them.
template <int N> DEVICE void pin_scores(float (&s)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) pin(s[i]);
}

// Hides the columns after each row's own position; `visible` is the last visible column of the tile for a thread's two
// rows, less its own column offset.
template <int N> DEVICE void mask(float (&s)[N], const int (&visible)[2]) {
#pragma unroll
  for (int i = 0; i < N; i++)
    if (i / 4 * 8 + i % 2 > visible[i / 2 % 2]) s[i] = -__uint_as_float(0x7F800000);
}

struct Softmax {
  float maximum[2], sum[2];  // of a thread's two rows: log2 of the scale of P, and the thread's part of the row sum
  float rescale[2];          // what earlier sums must be multiplied with since the last tile: powers of two
  bool changed;              // one of the warp's is not 1
};

// The largest or smallest of a thread's scores of a row, as integers: three at a time (VIMNMX3).
template <bool LARGEST, int N> DEVICE int extreme(const float (&s)[N], int row) {
  const auto better = [](int a, int b) { return LARGEST ? max(a, b) : min(a, b); };
  int a = __float_as_int(s[2 * row]), b = __float_as_int(s[2 * row + 1]);
#pragma unroll
  for (int i = 4; i < N; i += 8) {
    a = better(better(a, __float_as_int(s[i + 2 * row])), __float_as_int(s[i + 2 * row + 1]));
    if (i + 4 < N) b = better(better(b, __float_as_int(s[i + 4 + 2 * row])), __float_as_int(s[i + 5 + 2 * row]));
  }
  return better(a, b);
}

// Maxima of a thread's two rows over its columns. The largest integer is the largest float if it is not negative; if all
// are negative, the smallest is.
template <int N> DEVICE void row_maxima(const float (&s)[N], int (&top)[2]) {
  top[0] = extreme<true>(s, 0), top[1] = extreme<true>(s, 1);
  if (__any_sync(~0u, (top[0] | top[1]) < 0)) {
    const int low[2] = {extreme<false>(s, 0), extreme<false>(s, 1)};
    if (top[0] < 0) top[0] = low[0];
    if (top[1] < 0) top[1] = low[1];
  }
}

// Raises the maxima to those of s.
template <int N> DEVICE void raise(const float (&s)[N], Softmax& state, float scale) {
  int top[2];
  row_maxima(s, top);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m = __int_as_float(top[r]);
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    const float maximum = fmaxf(state.maximum[r], ceilf(m * scale));
    state.rescale[r] = ex2_approx(state.maximum[r] - maximum);
    state.sum[r] *= state.rescale[r];
    state.maximum[r] = maximum;
  }
  state.changed = __any_sync(~0u, state.rescale[0] != 1.f || state.rescale[1] != 1.f);
}

// s becomes P * 2^P_LOG2_SCALE.
template <int N> DEVICE void exponentials(float (&s)[N], const Softmax& state, float scale) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float bias = P_LOG2_SCALE - state.maximum[r];
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i / 2 % 2 == r) s[i] = ex2_approx(fmaf(s[i], scale, bias));
  }
}

// A tile's sums of P, onto `zero`: not among the exponentials, where each addition would wait for one just begun.
template <int N> DEVICE void sums(const float (&s)[N], float (&l)[2], float zero) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float l0 = zero, l1 = zero;
#pragma unroll
    for (int i = 0; i < N; i += 4) l0 += s[i + 2 * r], l1 += s[i + 2 * r + 1];
    l[r] = l0 + l1;
  }
}
