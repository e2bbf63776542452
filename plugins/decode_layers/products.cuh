#pragma once
// Units of 16 rows by all of K. Four columns of K are stacked in one wgmma of 64 rows and 32 columns, of which the diagonal
// blocks are wanted: few_tokens.cu, FOLD. The consumers leave the sums of each warp; a warp of its own finishes them.
#include "fp8/convert.cuh"
#include "fp8/cp_async.cuh"
#include "fp8/wgmma.cuh"
#include "sums.cuh"

constexpr int SUMS = CONSUMERS / 32 * UNIT;  // of a unit

template <int OP> DEVICE void multiply(const Ring& ring, Place& place, int& buffer, u32 x, float* sums) {
  constexpr int CHUNKS = 2 / WARPGROUPS;  // of four columns of K, of a stage and a warpgroup
  constexpr u64 A = 64ull << 32 | 1ull << 62 | 1ull << 16, B = 8ull << 32 | 1ull << 16;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, group = WARPGROUPS == 1 ? 0 : warp / 4;
#pragma unroll 1
  for (int unit = first_unit(OP); unit < units_of(OP); unit += GRID) {
    float d[16];
    int last = -1;
#pragma unroll 1
    for (int k = 0; k < steps_of(OP); k++) {
      mbarrier_wait(ring.full + place.stage * 8, place.parity);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int chunk = group * CHUNKS + c;
          const u32 a = (ring.data + place.stage * STAGE + chunk * (STAGE / 2)) / 16 + 2 * j;
          wgmma_ss_e4m3(d, A | a, B | (x + k * STAGE_K + chunk * (STAGE_K / 2)) / 16 + 2 * j, k | c | j);
        }
      wgmma_commit_group();
      wgmma_wait_group<1>();  // the stage before is read
      if (last >= 0 && lane == 0) mbarrier_arrive(ring.empty + last * 8);
      last = place.stage;
      place.advance();
    }
    wgmma_wait_group<0>();
#pragma unroll
    for (int i = 0; i < 16; i++) pin(d[i]);
    if (lane == 0) mbarrier_arrive(ring.empty + last * 8);
    const int fold = warp % 4;
    const float low = fold == 0 ? d[0] : fold == 1 ? d[4] : fold == 2 ? d[8] : d[12];
    const float high = fold == 0 ? d[2] : fold == 1 ? d[6] : fold == 2 ? d[10] : d[14];
    barrier_sync(FREE + buffer, CONSUMERS + 32);
    if (lane % 4 == 0) {
      float* to = sums + buffer * SUMS + warp * UNIT + lane / 4;
      to[0] = low, to[8] = high;
    }
    barrier_arrive(FULL + buffer, CONSUMERS + 32);
    buffer ^= 1;
  }
}

// Into the L2 cache, ahead of time: the scales of the block's rows of an op.
template <int OP> DEVICE void prefetch_scales(const Layer& layer) {
  const int unit = first_unit(OP) + threadIdx.x % 32 * GRID;
  if (unit < units_of(OP)) prefetch_l2_line(layer.w_scale[OP] + unit * UNIT);
}

// What becomes of a unit's sums, by one warp: lane `row` % 16 has a row. `first`, `last`: of the layers.
template <int OP> DEVICE void finish(const Params& p, const Layer& layer, int& buffer, const float* sums, u32 tag, bool first, bool last) {
  const int lane = threadIdx.x % 32, row = lane % UNIT;
  const float x_scale = layer.x_scale[OP], out_scale = layer.out_scale[DOWN];
  Exchange& exchange = *p.exchange;
#pragma unroll 1
  for (int unit = first_unit(OP); unit < units_of(OP); unit += GRID) {
    const int n = unit * UNIT + row;
    const float w_scale = layer.w_scale[OP][n];
    const u32 residual = addend<OP>(p, exchange, n, tag, first);
    barrier_sync(FULL + buffer, CONSUMERS + 32);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < CONSUMERS / 32; i++) sum += sums[buffer * SUMS + i * UNIT + row];
    barrier_arrive(FREE + buffer, CONSUMERS + 32);
    buffer ^= 1;
    const u16 rounded = from_float<DTYPE>(sum * x_scale * w_scale);
    const float v = to_float<DTYPE>(rounded);
    if (OP == GATE_UP) {
      const float up = __shfl_down_sync(~0u, v, 8), h = v * __fdiv_rn(1.f, 1.f + expf(-v)) * up;
      const u32 codes = e4m3x2(__fdiv_rn(h, out_scale), __fdiv_rn(__shfl_down_sync(~0u, h, 1), out_scale));
      if (lane < 8 && lane % 2 == 0) store_words(exchange.hidden + unit * 4 + lane / 2, codes | tag);
    } else if (OP == NEXT_QKV) {
      if (lane < UNIT) store_words(exchange.qkv + n, rounded | tag);
    } else if (lane < UNIT) {
      if (OP == DOWN && last) put_last(p, n, rounded, residual);
      else put_sum<OP>(p, RANKS > 1 ? rounded : from_float<DTYPE>(v + to_float<DTYPE>((u16)residual)), n, tag);
    }
  }
}
