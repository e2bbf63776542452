#pragma once
// Attention, the second part: a head's tiles joined in the order of the context.
#include "attend.cuh"

// The head that this block has, if any: joined, in the scale of o's x, to the words of all blocks. (Inlined, it takes registers
// that the rows of many heads need.)
static __device__ __noinline__ void join(const Params& p, const Layer& layer, const Run& run, Attending* shared, u32 tag) {
  constexpr int PARTS = CONSUMERS / HEAD_DIM, BATCH = 9;  // of the tiles, in turn; loads on their way
  const int head = ((int)blockIdx.x * HEADS + GRID - 1) / GRID;
  if (head >= HEADS || head * GRID / HEADS != (int)blockIdx.x) return;
  const float NONE = __int_as_float(0xFF800000);
  const int part = threadIdx.x / HEAD_DIM, d = threadIdx.x % HEAD_DIM;
  float m = NONE, l = 0.f, o = 0.f;
  const auto add = [&](float other_m, float other_l, float other_o) {
    if (other_m == NONE) return;
    const float top = fmaxf(m, other_m), mine = exp2f(m - top), factor = exp2f(other_m - top);
    m = top, l = l * mine + other_l * factor, o = o * mine + other_o * factor;
  };
#pragma unroll 1
  for (int start = part; start < run.tiles; start += PARTS * BATCH) {
    uint2 value[BATCH];
    uint4 m_l[BATCH];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (start + i * PARTS >= run.tiles) continue;
        const Tile& tile = ((const Tile*)p.partials)[head / GROUP * run.tiles + start + i * PARTS];
        value[i] = load_words(&tile.o[head % GROUP][d]), m_l[i] = load_words(&tile.m_l[head % GROUP]);
      }
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        if (start + i * PARTS < run.tiles) all &= value[i].y == tag && m_l[i].z == tag && m_l[i].w == tag;
    } while (!all);
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (start + i * PARTS < run.tiles) add(__uint_as_float(m_l[i].x), __uint_as_float(m_l[i].y), __uint_as_float(value[i].x));
  }
  if (PARTS > 1) {
    float* scratch = shared[1].joined;
    if (part) scratch[d] = m, scratch[HEAD_DIM + d] = l, scratch[2 * HEAD_DIM + d] = o;
    barrier_sync(EVERY, CONSUMERS);
    if (part) return;
    add(scratch[d], scratch[HEAD_DIM + d], scratch[2 * HEAD_DIM + d]);
  }
  const Divisor divisor(layer.out_scale[O]);
  const float v = l > 0.f ? divisor.divide(o * (layer.v_scale / l)) : 0.f, next = __shfl_down_sync(~0u, v, 1);
  if (d % 2 == 0) store_words(p.exchange->attention + (head * HEAD_DIM + d) / 2, e4m3x2(v, next) | tag << 16);
}
