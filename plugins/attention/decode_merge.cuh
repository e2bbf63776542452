#pragma once
// A unit's results joined over warps and blocks.
#include "fp8/rows.cuh"
#include "fp8/words.cuh"
#include "decode_block.cuh"
#include "decode_products.cuh"

// What a block has of a unit that began in another block: all bits of floats inverted, so that zero is none of them.
struct Partial {
  uint4 o[ROWS][HEAD_DIM / 4];
  uint2 m_l[ROWS][HEAD_DIM / 4];  // maximum and sum, for each four columns again
};

struct Output {
  void* y;
  float v_scale, out_scale;  // 1 where there is none

  // Four columns: o / l, in the cache's scale, rounded or quantized.
  __device__ __forceinline__ void store(u64 at, float4 o, float l) const {
    const float factor = v_scale / l;
    o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor;
    if (QUANT_OUT) {
      const Divisor d(out_scale);
      *(u32*)((u8*)y + at) = e4m3x4(d.divide(o.x), d.divide(o.y), d.divide(o.z), d.divide(o.w));
    } else {
      *(uint2*)((u16*)y + at) = make_uint2(from_float2<DTYPE>(o.x, o.y), from_float2<DTYPE>(o.z, o.w));
    }
  }
};

// a += b * factor.
DEVICE void add(float4& a, float4 b, float factor) {
  a.x += b.x * factor, a.y += b.y * factor, a.z += b.z * factor, a.w += b.w * factor;
}

// A result for four columns of a head.
struct Result {
  float m, l;
  float4 o;

  DEVICE_MEMBER void publish(Partial& partial, int r, int c) const {
    store_words(&partial.o[r][c / 4], make_uint4(~__float_as_uint(o.x), ~__float_as_uint(o.y), ~__float_as_uint(o.z), ~__float_as_uint(o.w)));
    store_words(&partial.m_l[r][c / 4], make_uint2(~__float_as_uint(m), ~__float_as_uint(l)));
  }
  // Adds `count` others in the order of the context, as they arrive, and leaves zeros.
  DEVICE_MEMBER void join(Partial* partials, int count, int r, int c) {
    constexpr int BATCH = WARPS < 4 || WARPS * BLOCKS_PER_SM > 8 ? 2 : 4;  // loads in flight: their latency is what this costs; three warps on a scheduler lack registers
#pragma unroll 1
    for (int start = 0; start < count; start += BATCH) {
      uint4 outputs[BATCH];
      uint2 sums[BATCH];
      bool there;
      do {
        there = true;
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          if (start + j >= count) continue;
          outputs[j] = load_words(&partials[start + j].o[r][c / 4]);
          sums[j] = load_words(&partials[start + j].m_l[r][c / 4]);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++)
          if (start + j < count) there &= outputs[j].x && outputs[j].y && outputs[j].z && outputs[j].w && sums[j].x && sums[j].y;
      } while (!there);
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        if (start + j >= count) continue;
        store_words(&partials[start + j].o[r][c / 4], make_uint4(0, 0, 0, 0));
        store_words(&partials[start + j].m_l[r][c / 4], make_uint2(0, 0));
        const float other = __uint_as_float(~sums[j].x), now = fmaxf(m, other);
        const float mine = exp2f(m - now), factor = exp2f(other - now);
        const float4 v = make_float4(__uint_as_float(~outputs[j].x), __uint_as_float(~outputs[j].y), __uint_as_float(~outputs[j].z), __uint_as_float(~outputs[j].w));
        m = now;
        l = l * mine + __uint_as_float(~sums[j].y) * factor;
        o = make_float4(o.x * mine, o.y * mine, o.z * mine, o.w * mine);
        add(o, v, factor);
      }
    }
  }
};

// Joins the warps' states, then those that `others` more blocks have of the unit, and stores the output. A block in which
// the unit does not begin (others < 0) leaves its result to the one in which it does.
DEVICE void merge(Shared& shared, const State& state, int rows, int others, const Output& y, u64 first, Partial* partials, int mine) {
  const int warp = threadIdx.x / 32, d = threadIdx.x % 32 / 4;
  const auto each_head = [&](auto body) {  // of those that the thread holds
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int h = 0; h < PAIR; h++) {
        const int row = 8 * n + threadIdx.x % 4 * 2 + h;
        if (row < rows) body(row, n, h);
      }
  };
  float l[COLUMN_TILES][2];
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
    for (int h = 0; h < PAIR; h++) {
      l[n][h] = state.l[n][h];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) l[n][h] += __shfl_xor_sync(~0u, l[n][h], i);
    }
  each_head([&](int row, int n, int h) {
    if (d == 0) shared.m[warp][row] = state.m[n][h], shared.l[warp][row] = l[n][h];
  });
#pragma unroll
  for (int pass = 0; pass < HEAD_DIM / COLUMNS; pass++) {
    each_head([&](int row, int n, int h) {
#pragma unroll
      for (int i = 0; i < COLUMNS / 16; i++) {
        const float(&o)[4] = state.o[pass * COLUMNS / 16 + i][n];
        shared.o[warp][row][16 * i + d] = o[h];
        shared.o[warp][row][16 * i + d + 8] = o[h + 2];
      }
    });
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (COLUMNS / 4); i += THREADS) {
      const int r = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4;
      float m = shared.m[0][r];
#pragma unroll
      for (int w = 1; w < WARPS; w++) m = fmaxf(m, shared.m[w][r]);
      Result result = {m, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float factor = exp2f(shared.m[w][r] - m);
        result.l += shared.l[w][r] * factor;
        add(result.o, *(const float4*)&shared.o[w][r][c], factor);
      }
      const int at = pass * COLUMNS + c;
      if (others < 0) {
        result.publish(partials[mine], r, at);
      } else {
        result.join(partials + mine + 1, others, r, at);
        y.store(first + r * HEAD_DIM + at, result.o, result.l);
      }
    }
    __syncthreads();
  }
}
