#pragma once
// The work list of the prefill kernels: one entry per tile of TILE_Q query rows of one sequence, longest first, so that blocks
// which take from it in order end evenly. An entry is {first row in the packed batch, valid rows, position of the first
// row in its context, sequence}. tiles[0] is {entries, items taken, heads of a section, 0}: an item is an entry and a head;
// the list is gone through for one section of heads after another, so that what a section reads stays in the L2 cache.
//
// Constants: FP8_CACHE.
#include "fp8/types.cuh"

constexpr int TILE_Q = FP8_CACHE ? 192 : 128;  // query rows: 64 of each consumer warpgroup
// A sequence's rows are divided from this multiple behind their end on: a tile that is not full is the one of the shortest context.
constexpr int TILE_STEP = FP8_CACHE ? 64 : 128;
constexpr int SECTION_BYTES = 16 << 20;  // of keys and values
constexpr int TILE_BINS = 128;  // by context length

// Counting sort by one warp with `bins` [TILE_BINS] in shared memory: a lane takes every 32nd of the sequences [first, last). The
// order within a bin is free and changes no result. `kv_bytes`: of a token and a head; `group`: heads that share them, of `kv_heads`.
DEVICE void write_tiles(int* bins, int4* tiles, const int* query_start, const int* sequence_lengths, int first, int last, int kv_bytes,
                        int kv_heads, int group) {
  constexpr int EACH = TILE_BINS / 32;
  const int lane = threadIdx.x % 32;
  int context = 0, longest = 1;
  for (int i = first + lane; i < last; i += 32) context += sequence_lengths[i], longest = max(longest, sequence_lengths[i]);
  context = __reduce_add_sync(~0u, context), longest = __reduce_max_sync(~0u, longest);
  const int width = ((longest - 1) / (TILE_BINS * 128) + 1) * 128;  // of a bin, in tokens
  for (int i = 0; i < EACH; i++) bins[lane * EACH + i] = 0;
  __syncwarp();
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {  // count, then place
#pragma unroll 1
    for (int i = first + lane; i < last; i += 32) {
      const int begin = query_start[i], rows = query_start[i + 1] - begin, cached = sequence_lengths[i] - rows;
#pragma unroll 1
      for (int end = (rows + TILE_STEP - 1) / TILE_STEP * TILE_STEP; end > 0; end -= TILE_Q) {
        const int row = max(end - TILE_Q, 0), valid = min(end, rows) - row, bin = (max(cached + row + valid, 1) - 1) / width;
        const int place = atomicAdd(&bins[TILE_BINS - 1 - bin], 1);
        if (pass == 1) tiles[1 + place] = make_int4(begin + row, valid, cached + row, i);
      }
    }
    __syncwarp();
    if (pass == 1) break;
    int sum = 0;  // exclusive prefix sum over the bins
    for (int i = 0; i < EACH; i++) sum += bins[lane * EACH + i];
    int before = -sum;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    before += sum;
    for (int i = 0; i < EACH; i++) {
      const int count = bins[lane * EACH + i];
      bins[lane * EACH + i] = before, before += count;
    }
    const int at_once = (int)min((u64)kv_heads, max(1ull, (u64)SECTION_BYTES / max(1ull, (u64)context * kv_bytes)));
    if (lane == 31) tiles[0] = make_int4(before, 0, at_once * group, 0);
    __syncwarp();
  }
}
