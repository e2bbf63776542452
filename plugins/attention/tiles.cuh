#pragma once
// The work list of the prefill kernel: one entry per tile of 128 query rows of one sequence, longest first, so that blocks
// which take from it in order end evenly. An entry is {first row in the packed batch, valid rows, position of the first
// row in its context, sequence}. tiles[0] is {entries, items taken, heads of a section, 0}: an item is an entry and a head;
// the list is gone through for one section of heads after another, so that what a section reads stays in the L2 cache.
#include "fp8/types.cuh"

constexpr int TILE_Q = 128;
constexpr int SECTION_BYTES = 16 << 20;  // of keys and values
constexpr int TILE_BINS = 1024;  // by context length in units of 128 tokens; longer ones share the last bin

DEVICE int tile_bin(int context) { return TILE_BINS - 1 - min(max(context + 127, 0) / 128, TILE_BINS - 1); }

// Counting sort by one block of 256 threads; the order within a bin is free and changes no result. `kv_bytes`: of a token
// and a head; `group`: heads that share them, of `kv_heads`.
DEVICE void write_tiles(int4* tiles, const int* query_start, const int* sequence_lengths, int first, int last, int kv_bytes, int kv_heads,
                        int group) {
  __shared__ int bins[TILE_BINS], warp_sums[8], context;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < TILE_BINS; i += 256) bins[i] = 0;
  if (threadIdx.x == 0) context = 0;
  __syncthreads();
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {  // count, then place
#pragma unroll 1
    for (int i = first + warp; i < last; i += 8) {
      const int begin = query_start[i], rows = query_start[i + 1] - begin, cached = sequence_lengths[i] - rows;
      if (pass == 0 && lane == 0) atomicAdd(&context, sequence_lengths[i]);
#pragma unroll 1
      for (int row = lane * TILE_Q; row < rows; row += 32 * TILE_Q) {
        const int valid = min(TILE_Q, rows - row);
        const int place = atomicAdd(&bins[tile_bin(cached + row + valid)], 1);
        if (pass == 1) tiles[1 + place] = make_int4(begin + row, valid, cached + row, i);
      }
    }
    __syncthreads();
    if (pass == 1) break;
    int count[4], sum = 0;  // exclusive prefix sum over the bins, four per thread
    for (int i = 0; i < 4; i++) count[i] = bins[threadIdx.x * 4 + i], sum += count[i];
    int inclusive = sum;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive, d);
      if (lane >= d) inclusive += other;
    }
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    int before = inclusive - sum;
    for (int w = 0; w < warp; w++) before += warp_sums[w];
    for (int i = 0; i < 4; i++) bins[threadIdx.x * 4 + i] = before, before += count[i];
    const int at_once = (int)min((u64)kv_heads, max(1ull, (u64)SECTION_BYTES / max(1ull, (u64)context * kv_bytes)));
    if (threadIdx.x == 255) tiles[0] = make_int4(before, 0, at_once * group, 0);
    __syncthreads();
  }
}
